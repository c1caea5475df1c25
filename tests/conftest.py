"""What all tests share: one pool of worker processes, one thread per process, and the order of
files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# As commands set it before they import torch: those that are forked find it imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest
import torch
from hypothesis import settings

from support.processes.cluster import Cluster

if not torch.cuda.is_available():
    # Kernels for GPUs run in Triton's interpreter, which is chosen when Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("default", deadline=None)
settings.register_profile("soak", deadline=None, max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)

SLOWER = ("mp", "slow", "chaos")
"""Marks of tests that `make test-quick` leaves out; only they may start processes."""
MOST_RANKS = 16
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest tests come first, so that no worker is left with one of them at the
    end.
    """
    weights: dict[Path, int] = {}
    for item in items:
        marks = [item.get_closest_marker(mark) is not None for mark in SLOWER]
        weights[item.path] = weights.get(item.path, 0) + (4**3 if marks[2] else sum(marks))
    items.sort(key=lambda item: -weights[item.path])


class QuickTests:
    """Fails a test that starts a process and is not marked as one that does."""

    def __init__(self) -> None:
        self._test: str | None = None
        sys.addaudithook(self._check)

    def _check(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._test is not None and event in STARTS:
            raise AssertionError(f"{self._test} starts a process ({event}): mark it mp")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Watch each test from its set-up to its end."""
        marked = any(item.get_closest_marker(mark) for mark in SLOWER)
        self._test = None if marked else item.nodeid
        try:
            return (yield)
        finally:
            self._test = None


def pytest_configure(config: pytest.Config) -> None:
    """Watch the tests of this process."""
    config.pluginmanager.register(QuickTests())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    pool = Cluster(MOST_RANKS)
    yield pool
    pool.close()
