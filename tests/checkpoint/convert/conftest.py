"""What tests with Megatron-Core share: workers in which CUDA's functions are answered by the processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.processes.cluster import Cluster


@pytest.fixture(scope="session")
def megatron_pool() -> Iterator[Cluster]:
    pool = Cluster(4)
    yield pool
    pool.close()
