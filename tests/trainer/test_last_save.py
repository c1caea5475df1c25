"""The last save of a run: nothing is written past it, and what ranks hold is not thrown away."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.trainer.config.loading import dump_toml
from holdfast.trainer.saves import Checkpoints
from support.processes.forked_command import ForkedCommand
from support.runs.small_runs import events_of, make_config, metrics_of

STEPS = 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _train(config: Any, folder: Path, before: str = "") -> ForkedCommand:
    path = folder / "run.toml"
    path.write_text(dump_toml(config))
    return ForkedCommand(
        ["train", str(path), "--out", "run"],
        folder / "run.txt",
        ENVIRONMENT,
        folder=folder,
        before=before,
    )


@pytest.mark.mp
@pytest.mark.parametrize("elastic", [False, True])
def test_a_run_past_its_last_step_writes_nothing_and_says_so(tmp_path: Path, elastic: bool) -> None:
    sections: dict[str, Any] = {"parallel": {"data": 2}, "checkpoint": {"every": 3, "keep": 0}}
    sections["model"] = {"layers": 2}
    sections["elastic"] = {"enabled": elastic}
    config = make_config(**sections, train={"steps": 12, "stop_after": 9, "global_batch": 2})
    assert _train(config, tmp_path).wait(timeout=90) == 0
    root = tmp_path / "run"
    store = LocalStore(root / "checkpoints")
    before = {name: store.manifest(name).id for name in store.names()}
    assert list(before) == ["step-00000003", "step-00000006", "step-00000009"]
    again = _train(make_config(**sections, train={"steps": 6, "global_batch": 2}), tmp_path)
    assert again.wait(timeout=90) == 0, again.printed()
    assert {name: store.manifest(name).id for name in store.names()} == before
    notes = [event["message"] for event in events_of(root, "resume_note")]
    assert any("the run is at step 9, past train.steps = 6" in note for note in notes)
    assert not events_of(root, "run_finished")
    assert len(metrics_of(root)) == 9


def lose_the_place() -> None:
    """Have every save of the run in this folder fail after two steps, whichever user runs it."""
    after_step = Checkpoints.after_step

    def lost(self: Any, step: int, outcome: Any) -> Any:
        if step == 2 and self._manager.members.rank == 0:
            shutil.rmtree("run/checkpoints", ignore_errors=True)
            Path("run/checkpoints").write_text("not a folder")
        return after_step(self, step, outcome)

    Checkpoints.after_step = lost  # type: ignore[method-assign]


def _without_a_place_to_save(folder: Path, *, retry_s: float, elastic: bool) -> ForkedCommand:
    """A run whose saves fail from its second step on."""
    config = make_config(
        model={"layers": 2},
        parallel={"data": 2},
        train={"steps": STEPS, "global_batch": 2},
        checkpoint={"retry_s": retry_s},
        elastic={"enabled": elastic},
    )
    return _train(config, folder, before="test_last_save:lose_the_place")


@pytest.mark.mp
@pytest.mark.parametrize("elastic", [False, True])
def test_a_last_save_that_cannot_be_made_ends_the_run_and_repeats_no_step(
    tmp_path: Path, elastic: bool
) -> None:
    root = tmp_path / "run"
    run = _without_a_place_to_save(tmp_path, retry_s=2.0, elastic=elastic)
    assert run.wait(timeout=120) == 1, run.printed()
    assert "all steps are done, but the last is not saved" in run.printed()
    assert [line["step"] for line in metrics_of(root)] == list(range(1, STEPS + 1))
    assert len(events_of(root, "checkpoint_failed")) == 1, "tried again, and told once"
    assert not events_of(root, "run_finished")


def _has_failed(root: Path) -> bool:
    return (root / "events.jsonl").exists() and bool(events_of(root, "checkpoint_failed"))


@pytest.mark.mp
def test_a_last_save_succeeds_once_there_is_room(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run = _without_a_place_to_save(tmp_path, retry_s=60.0, elastic=True)
    _wait_for(lambda: _has_failed(root))
    (root / "checkpoints").unlink()
    assert run.wait(timeout=120) == 0, run.printed()
    assert verify_checkpoint(root / "checkpoints" / f"step-{STEPS:08d}") == []
    assert events_of(root, "run_finished")
