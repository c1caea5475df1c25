"""What tests with Megatron-Core share: workers whose calls of CUDA the processor answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.processes.cluster import Cluster


@pytest.fixture(scope="session")
def megatron_pool() -> Iterator[Cluster]:
    pool = Cluster(4)
    yield pool
    pool.close()
