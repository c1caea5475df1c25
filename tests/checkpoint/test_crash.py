"""Killed, failed and full: the newest checkpoint always loads, and the next save cleans up."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import Checkpointer, load
from holdfast.checkpoint.format.names import PARTIAL
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools.verify import verify_checkpoint
from support.processes.forked_command import ForkedCommand

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.slow
def test_kills_at_random_instants_lose_no_committed_checkpoint(tmp_path: Path) -> None:
    rounds = 16 if os.environ.get("HYPOTHESIS_PROFILE") != "soak" else 400
    errors = tmp_path / "errors"
    done = ForkedCommand(
        [str(tmp_path / "c"), str(rounds), "7"],
        tmp_path / "output",
        {**os.environ, "OMP_NUM_THREADS": "1"},
        errors=errors,
        script=SUPPORT / "processes" / "crash_rounds.py",
    )
    assert done.wait(1500) == 0, errors.read_text()
    seen = json.loads(done.printed())
    assert seen["reached"] > rounds // 4, seen
    assert seen["torn"] > 0, "no kill fell into a save; the test shows nothing"


class Fault:
    """Lets the nth call of some operation of the operating system fail."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.left = -1
        self.calls = 0
        self.error = 0
        original = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.left == 0:
                self.left = -1
                raise OSError(self.error, os.strerror(self.error))
            self.left -= self.left > 0
            return original(*arguments, **keywords)

        patch.setattr(owner, name, call)

    def after(self, calls: int, error: int) -> None:
        self.left, self.error = calls, error


def _values(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((700, 900), float(step)), "b": torch.full((5,), float(-step))}


def _check_after(folder: Path, state: dict[str, torch.Tensor], checkpointer: Checkpointer) -> None:
    """The failed save of step 2 left step 1 as it was; step 3 then works and nothing else stays."""
    first, second = checkpointer.results()
    assert not first.error
    assert second.error
    assert second.path is None
    _load_and_compare(folder / "step-00000001", 1)
    assert [path.name for path in LocalStore(folder).paths()] == ["step-00000001"]
    for name, value in _values(3).items():
        state[name].copy_(value)
    checkpointer.save(3, wait=True)
    _load_and_compare(folder / "step-00000003", 3)
    assert not [path for path in folder.iterdir() if PARTIAL in path.name]


def _load_and_compare(checkpoint: Path, step: int) -> None:
    assert verify_checkpoint(checkpoint) == []
    found = {name: torch.empty_like(value) for name, value in _values(0).items()}
    load(checkpoint, found)
    assert all(torch.equal(found[name], value) for name, value in _values(step).items())


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("operation", ["open", "write"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_write_that_fails_costs_one_checkpoint(
    tmp_path: Path, operation: str, error: int, after: int
) -> None:
    state = _values(1)
    with Checkpointer(tmp_path, state, arena_bytes=1) as checkpointer:
        checkpointer.save(1, wait=True)
        assert checkpointer._manager._saver is not None
        if operation == "open" and after:
            pytest.skip("one file is opened")
        checkpointer._manager._saver.engine.inject(operation, after, error)
        for name, value in _values(2).items():
            state[name].copy_(value)
        checkpointer.save(2)
        checkpointer._manager._saver.wait()
        _check_after(tmp_path, state, checkpointer)


def test_short_writes_are_completed(tmp_path: Path) -> None:
    state = _values(1)
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1, wait=True)
        assert checkpointer._manager._saver is not None
        checkpointer._manager._saver.engine.inject("write", 0, 0, 4)
        for name, value in _values(2).items():
            state[name].copy_(value)
        checkpointer.save(2, wait=True)
    _load_and_compare(tmp_path / "step-00000002", 2)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (Path, "rename"), (Path, "replace"), (os, "pwrite"), (Path, "mkdir")],
)
def test_each_sync_and_rename_that_fails_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """Every single call of the operation during a save fails once, in turn."""
    fault = Fault(monkeypatch, owner, name)
    count, after = 1, 0
    while after < count:
        folder = tmp_path / f"{name}-{after}"
        state = _values(1)
        with Checkpointer(folder, state) as checkpointer:
            checkpointer.save(1, wait=True)
            for key, value in _values(2).items():
                state[key].copy_(value)
            fault.calls = 0
            fault.after(after, errno.EIO)
            checkpointer.save(2)
            assert checkpointer._manager._saver is not None
            checkpointer._manager._saver.wait()
            fault.left = -1
            count = max(count, fault.calls)
            found = LocalStore(folder).paths()
            [_, result] = checkpointer.results()
            _load_and_compare(found[0], 1)
            if len(found) == 2:
                # The rename was done, and only what follows it failed: the checkpoint stands.
                _load_and_compare(found[1], 2)
            else:
                assert result.error
            for key, value in _values(3).items():
                state[key].copy_(value)
            checkpointer.save(3, wait=True)
            _load_and_compare(folder / "step-00000003", 3)
            assert not [path for path in folder.iterdir() if PARTIAL in path.name]
        after += 1
    assert count >= 1


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.checkpoint.stores import local

    monkeypatch.setattr(local, "free_bytes", lambda root: 1000)
    with Checkpointer(tmp_path / "c", _values(1)) as checkpointer:
        checkpointer.save(1)
        assert checkpointer._manager._saver is not None
        checkpointer._manager._saver.wait()
        [result] = checkpointer.results()
    assert "B free and the checkpoint takes" in result.error
    assert not (tmp_path / "c").exists()


def test_a_save_that_is_late_is_given_up_and_named(tmp_path: Path) -> None:
    """A device that does not answer costs the checkpoint, and the training thread goes on."""
    import threading

    from holdfast.checkpoint.saving import save

    release = threading.Event()
    state = _values(1)
    patch = pytest.MonkeyPatch()
    try:
        with Checkpointer(tmp_path, state, timeout_s=1.0) as checkpointer:
            checkpointer.save(1, wait=True)

            def stuck(*arguments: Any) -> int:
                release.wait(30)
                raise OSError(errno.EIO, "released")

            patch.setattr(save.Save, "_finish_file", stuck)
            checkpointer.save(2)
            assert checkpointer._manager._saver is not None
            assert checkpointer._manager._saver.busy
            assert checkpointer._manager._saver.fence(0) > 0, "the fence is open: all is copied"
            release.set()
            checkpointer._manager._saver.wait()
            patch.undo()
            _check_after(tmp_path, state, checkpointer)
    finally:
        release.set()
        patch.undo()
