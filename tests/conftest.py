"""What all tests share: one pool of worker processes, one thread per process."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from support.processes.cluster import Cluster

settings.register_profile("default", deadline=None)
settings.register_profile("soak", deadline=None, max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    pool = Cluster()
    yield pool
    pool.close()
