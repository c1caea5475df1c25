"""The remote tier of a run, without processes: what is uploaded, and what a change leaves over."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from holdfast.checkpoint import save
from holdfast.checkpoint.saving.coordination import Members
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.remote import FsspecStore
from holdfast.checkpoint.tiers.remote_tier import RemoteTier

NAMES = [f"step-{step:08d}" for step in range(1, 10)]


class Alone:
    """A communicator of one rank."""

    size = 1

    class Done:
        def wait(self) -> None:
            pass

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> Done:
        return self.Done()

    def all_gather(self, parts: list[Tensor], mine: Tensor) -> Done:
        parts[0].copy_(mine)
        return self.Done()


ALONE: Any = Alone()


class Stuck(FsspecStore):
    """A store that does not answer until it is released."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked, self.released = threading.Event(), threading.Event()

    def put(self, source: Path, name: str, file: str) -> None:
        self.asked.set()
        self.released.wait(30)
        raise OSError("no answer")


@pytest.fixture
def disk(tmp_path: Path) -> LocalStore:
    for step in range(1, 6):
        save(tmp_path / "disk", {"a": torch.full((9,), float(step))}, step=step)
    return LocalStore(tmp_path / "disk")


def _tier(disk: LocalStore, target: FsspecStore, every: int = 1, keep: int = 0) -> RemoteTier:
    return RemoteTier(disk, target, Members(0, (0,), HashStore()), every=every, keep=keep)


def test_one_of_so_many_commits_is_uploaded_the_first_one_too(
    disk: LocalStore, tmp_path: Path
) -> None:
    target = FsspecStore(f"file://{tmp_path}/far")
    tier = _tier(disk, target, every=2, keep=2)
    for name in NAMES[:5]:
        tier.committed(name)
    tier.wait()
    assert [result.name for result in tier.results()] == [NAMES[0], NAMES[2], NAMES[4]]
    assert target.names() == [NAMES[2], NAMES[4]], "two stay"
    assert target.latest() == NAMES[4]
    assert tier.pending == set()


def test_what_an_abort_leaves_over_is_uploaded_by_the_ranks_that_follow(
    disk: LocalStore, tmp_path: Path
) -> None:
    stuck = Stuck(f"file://{tmp_path}/far")
    before = _tier(disk, stuck)
    for name in NAMES[:3]:
        before.committed(name)
    assert stuck.asked.wait(30)
    before.abort("the ranks change")
    assert before.pending == set(NAMES[:3]), "these must stay on the disk"
    before.wait()
    stuck.released.set()
    target = FsspecStore(f"file://{tmp_path}/far")
    after = _tier(disk, target)
    _tier(disk, target).agree(before, ALONE)  # in a change that does not come to stand
    after.agree(before, ALONE)
    assert before.pending == set(NAMES[:3])
    assert target.names() == []
    after.take_over()
    after.wait()
    assert [result.error for result in after.results()] == [""] * 3
    assert target.names() == NAMES[:3]


def test_a_checkpoint_that_its_run_could_not_upload_is_made_good(
    disk: LocalStore, tmp_path: Path
) -> None:
    target = FsspecStore(f"file://{tmp_path}/far")
    tier = _tier(disk, target)
    tier.upload_missing(NAMES[4], ALONE)
    tier.wait()
    assert target.names() == [NAMES[4]]
    tier.upload_missing(NAMES[4], ALONE)
    tier.wait()
    assert len(tier.results()) == 1, "what is there is not sent again"
