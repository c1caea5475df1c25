"""The manager under both front doors: two ranks, as two threads of one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from holdfast.checkpoint.format.files import Manifest
from holdfast.checkpoint.format.plan_types import HeldBox, SavedTensor, WritePlan
from holdfast.checkpoint.loading.targets import LoadTarget
from holdfast.checkpoint.manager import CheckpointManager, ManagerSettings
from holdfast.checkpoint.saving.coordination import Members
from holdfast.checkpoint.saving.job import SaveJob
from holdfast.checkpoint.saving.snapshot import ALL
from holdfast.checkpoint.saving.write_plan import make_write_plan
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.protocol import StoredCheckpoint
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

T = TypeVar("T")
ROWS, COLUMNS = 64, 300
HALVES = Box((0, 0), (ROWS // 2, COLUMNS)), Box((ROWS // 2, 0), (ROWS, COLUMNS))


class Ranks:
    """Two managers that work as two ranks, each in a thread of its own."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        store = HashStore()
        settings = ManagerSettings(timeout_s=timeout_s)
        self.managers = [CheckpointManager(Members(r, (0, 0), store), settings) for r in (0, 1)]
        self._threads = ThreadPoolExecutor(2)

    def all(self, call: Callable[[int, CheckpointManager], T]) -> list[T]:
        """Call on both ranks at once."""
        return list(self._threads.map(call, (0, 1), self.managers))

    def close(self) -> None:
        for manager in self.managers:
            manager.close()
        self._threads.shutdown()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    both = Ranks()
    yield both
    both.close()


def _plan() -> WritePlan:
    parts = tuple(HeldBox(box, (rank,)) for rank, box in enumerate(HALVES))
    tensor = SavedTensor("exp_avg.w", "exp_avg", "F32", (ROWS, COLUMNS), parts, False)
    return make_write_plan([tensor], (0, 0))


def _values(step: int) -> Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) * step


def _job(folder: Path, step: int, **more: Any) -> SaveJob:
    values = _values(step)
    return SaveJob(
        step=step,
        store=LocalStore(folder),
        tier="disk",
        plan=_plan(),
        source=lambda name, box: values[box.slices],
        scalars={"step": step},
        **more,
    )


def _save(ranks: Ranks, folder: Path, step: int) -> None:
    ranks.all(lambda rank, manager: manager.save(_job(folder, step)))
    assert all(ranks.all(lambda rank, manager: manager.finish()))


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_ranks_save_what_they_have_and_load_what_they_want(
    ranks: Ranks, tmp_path: Path
) -> None:
    _save(ranks, tmp_path, 1)
    _save(ranks, tmp_path, 2)
    for manager in ranks.managers:
        results = manager.results()
        assert [(r.step, r.error) for r in results] == [(1, ""), (2, "")]
        assert manager.results() == [], "each is told once"
    assert verify_checkpoint(tmp_path / "step-00000002") == []
    loaded = [torch.zeros(ROWS // 2, COLUMNS) for _ in range(2)]
    other_way = HALVES[::-1]

    def load(rank: int, manager: CheckpointManager) -> int:
        def prepare(manifest: Manifest) -> Any:
            wanted = {peer: {"exp_avg.w": [other_way[peer]]} for peer in (0, 1)}
            return {"exp_avg.w": [LoadTarget(other_way[rank], loaded[rank])]}, wanted

        checkpoint = StoredCheckpoint(LocalStore(tmp_path), "step-00000002")
        manifest, statistics = manager.load(checkpoint, "first", prepare)
        assert statistics.node_bytes == ROWS * COLUMNS * 4, "each byte is read once"
        return int(manifest.scalars["step"])

    assert ranks.all(load) == [2, 2]
    assert torch.equal(torch.cat(loaded[::-1]), _values(2))


def test_a_rank_that_aborts_costs_the_checkpoint_on_all_and_the_next_one_works(
    ranks: Ranks, tmp_path: Path
) -> None:
    _save(ranks, tmp_path, 1)
    ranks.managers[0].save(_job(tmp_path, 2))
    ranks.managers[0].abort("the ranks change")
    assert ranks.managers[0].fence(0) == ALL
    _wait_for(lambda: not ranks.managers[0].busy)  # it needs rank 1, and waits for it no longer
    ranks.managers[1].save(_job(tmp_path, 2))
    assert all(ranks.all(lambda rank, manager: manager.finish()))
    for manager in ranks.managers:
        *_, result = manager.results()
        assert (result.step, result.path) == (2, None)
        assert "the ranks change" in result.error
    assert LocalStore(tmp_path).names() == ["step-00000001"]
    _save(ranks, tmp_path, 3)
    assert LocalStore(tmp_path).names() == ["step-00000001", "step-00000003"]


def test_giving_up_a_save_waits_for_no_disk(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer holds the thread of the save, and nothing else."""
    syncing, go_on = threading.Event(), threading.Event()
    sync = os.fsync

    def slow(descriptor: int) -> None:
        syncing.set()
        assert go_on.wait(30)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    ranks.all(lambda rank, manager: manager.save(_job(tmp_path, 1)))
    assert syncing.wait(30)
    began = time.monotonic()
    for manager in ranks.managers:
        manager.abort("rank 2 is lost")
        assert manager.fence(0) == ALL
        assert not manager.wait(30), "the thread is still there, and is not waited for"
    assert time.monotonic() - began < 25
    go_on.set()
    for manager in ranks.managers:
        _wait_for(lambda manager=manager: not manager.busy)
        [result] = manager.results()
        assert "rank 2 is lost" in result.error
    assert not list(tmp_path.iterdir()), "what it wrote is removed"


def test_a_wait_for_a_save_ends_when_the_save_is_given_up(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor: go_on.wait(30))
    first = ranks.managers[0]
    ranks.all(lambda rank, manager: manager.save(_job(tmp_path, 1)))
    threading.Timer(0.1, first.abort, ("rank 2 is lost",)).start()
    began = time.monotonic()
    assert not first.finish()
    assert time.monotonic() - began < 20
    go_on.set()


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    ranks = Ranks(timeout_s=0.3)
    first = ranks.managers[0]
    first.save(_job(tmp_path, 1))
    assert first.finish()
    [result] = first.results()
    assert "no word in time from rank 1 (has not begun)" in result.error
    assert not list(tmp_path.iterdir()), "what was written is removed"
    ranks.close()


def test_damage_is_an_error_before_anything_is_used(ranks: Ranks, tmp_path: Path) -> None:
    _save(ranks, tmp_path, 1)
    [file] = (tmp_path / "step-00000001").glob("optimizer-00001-*.safetensors")
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    failures: list[str] = []
    met = threading.Barrier(2)

    def load(rank: int, manager: CheckpointManager) -> None:
        target = torch.zeros(ROWS // 2, COLUMNS)

        def prepare(manifest: Manifest) -> Any:
            return {"exp_avg.w": [LoadTarget(HALVES[rank], target)]}, {
                rank: {"exp_avg.w": [HALVES[rank]]}
            }

        checkpoint = StoredCheckpoint(LocalStore(tmp_path), "step-00000001")
        met.wait(30)
        try:
            manager.load(checkpoint, f"only {rank}", prepare)
        except CheckpointError as error:
            failures.append(str(error))

    ranks.all(load)
    assert len(failures) == 1, "each rank checks its share of the headers"
    assert file.name in failures[0]
    assert "is damaged" in failures[0]
