"""Slow work is no hang, and a hang is found: with a hang time-out far below what the work takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import CheckpointManager
from holdfast.elastic import MembershipSettings
from holdfast.parallel.output import read_evidence
from holdfast.parallel.pipeline import Executor
from holdfast.trainer.saves import Checkpoints
from support.processes.cluster import Cluster
from support.runs.elastic_runs import PATIENT_MS, Starter, bits_of, fault, pace
from support.runs.small_runs import make_config, run_training
from support.soak import only_in_soak

pytestmark = [pytest.mark.mp]

HANG_S = 2.0
MODEL = {"layers": 2}
TRAIN = {"steps": 12, "global_batch": 3}
SLOW_S = 3.2 * HANG_S
AGREEING = MembershipSettings("", "busy", 3, heartbeat_timeout_ms=PATIENT_MS, hang_timeout_s=HANG_S)
LONG_S = AGREEING.patience_s + 1.0
"""Longer than ranks of which nothing is heard are waited for."""
STEP_S = 1.2 * HANG_S
"""Longer than the time-out, and less than five times as long as itself."""


def slow_work() -> None:
    """Have each kind of work take long on one of two ranks, once."""
    done: set[str] = set()

    def slow(cls: type, name: str, here: Callable[..., bool]) -> None:
        whole = getattr(cls, name)

        def slowed(self: Any, *arguments: Any, **named: Any) -> Any:
            if name not in done and here(self, *arguments):
                done.add(name)
                print("slow:", name, flush=True)
                time.sleep(SLOW_S)
            return whole(self, *arguments, **named)

        setattr(cls, name, slowed)

    slow(CheckpointManager, "fence", lambda manager, _: manager.members.rank == 1)
    slow(CheckpointManager, "load", lambda manager, *_: manager.members.rank == 1)
    slow(Executor, "run", lambda executor, program, *_: executor._comm.index and _forward(program))


def _forward(program: Any) -> bool:
    return not any(action.op.value in ("B", "I", "W") for action in program)


def long_work() -> None:
    """Have rank 1 compute for long in its sixth step, report it for long, as that step was
    interrupted, and do so again in the step before a change.
    """
    run, report, counted, told = Executor.run, Checkpoints.after_step, [0], []

    def longer(self: Any, *arguments: Any) -> Any:
        counted[0] += self._comm.index == 1
        if counted[0] == 6 and self._comm.index == 1:
            print("slow: run", flush=True)
            time.sleep(LONG_S)
        return run(self, *arguments)

    def later(self: Any, step: int, outcome: Any) -> Any:
        arrived = self._training.plan.incoming and not outcome.requests.filling
        changes = outcome.requests.change or arrived
        if changes and self._manager.members.rank == 1 and len(told) < 2:
            told.append(step)
            print("slow: report", flush=True)
            time.sleep(LONG_S if len(told) == 2 else LONG_S / 2)
        return report(self, step, outcome)

    Executor.run = longer  # type: ignore[method-assign]
    Checkpoints.after_step = later  # type: ignore[method-assign]


def endless_step() -> None:
    """Have a worker of rank 1 compute for ever in its sixth step, but not its replacement."""
    run, counted = Executor.run, [0]

    def endless(self: Any, *arguments: Any) -> Any:
        counted[0] += self._comm.index == 1
        while counted[0] == 6 and self._comm.index == 1:
            pass
        return run(self, *arguments)

    Executor.run = endless  # type: ignore[method-assign]


MARK = "HOLDFAST_TEST_MARK"
"""The environment variable with a file that says that a rank has hung already."""


def _hang_once() -> None:
    """Sleep for ever, but in the first process only that comes here."""
    try:
        Path(os.environ[MARK]).touch(exist_ok=False)
    except FileExistsError:
        return
    print("hangs", flush=True)
    time.sleep(1e6)


def _hanging(cls: type, name: str, here: Callable[..., bool]) -> None:
    whole = getattr(cls, name)

    def hung(self: Any, *arguments: Any, **named: Any) -> Any:
        if here(self, *arguments):
            _hang_once()
        return whole(self, *arguments, **named)

    setattr(cls, name, hung)


def hang_in_a_save() -> None:
    _hanging(CheckpointManager, "fence", lambda manager, _: manager.members.rank == 1)


def hang_in_a_load() -> None:
    _hanging(CheckpointManager, "load", lambda manager, *_: manager.members.rank == 1)


def hang_in_an_evaluation() -> None:
    _hanging(Executor, "run", lambda e, program, *_: e._comm.index == 1 and _forward(program))


def all_hang_in_an_evaluation() -> None:
    """Have both ranks hang in the same call, so that none waits for the other."""
    run = Executor.run

    def hung(self: Any, program: Any, *arguments: Any) -> Any:
        if _forward(program):
            time.sleep(1e6)
        return run(self, program, *arguments)

    Executor.run = hung  # type: ignore[method-assign]


def slow_compiler() -> None:
    """Have rank 1 compile for long in its sixth step: torch's compiler itself, with slow parts."""
    import torch

    run, counted = Executor.run, [0]

    def backend(graph: Any, _: Any) -> Any:
        print("slow: compile", flush=True)
        time.sleep(SLOW_S)
        return graph

    def compiling(self: Any, *arguments: Any) -> Any:
        counted[0] += self._comm.index == 1
        if counted[0] == 6 and self._comm.index == 1:
            torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
        return run(self, *arguments)

    Executor.run = compiling  # type: ignore[method-assign]


def slow_parts(root: Path) -> set[str]:
    return {
        line.removeprefix("slow: ")
        for path in root.glob("logs/rank-*.log")
        for line in path.read_text().splitlines()
        if line.startswith("slow: ")
    }


def test_no_rank_is_lost_to_slow_saves_loads_evaluations_and_steps(
    tmp_path: Path, cluster: Cluster
) -> None:
    start = Starter(tmp_path, before="test_busy_ranks:slow_work")
    sections: dict[str, Any] = {
        "parallel": {"data": 2},
        "checkpoint": {"every": 4},
        "train": {**TRAIN, "eval_every": 6, "eval_batches": 1},
        "model": MODEL,
    }
    elastic = {"hang_timeout_s": HANG_S}
    expected = bits_of(run_training(cluster, make_config(train=TRAIN, model=MODEL)))
    try:
        stop = {"train": {**sections["train"], "stop_after": 8}}
        first = start(name="run", **sections | stop, elastic=elastic)
        assert first.finish() == 0, first.output()
        run = start(name="run", **sections, elastic=pace(elastic, STEP_S, rank=1))
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    assert slow_parts(run.root) == {"fence", "load", "run"}
    assert run.bits()["steps"] == expected["steps"]
    assert not run.events("rank_lost")


@only_in_soak
def test_no_rank_is_lost_because_it_works_while_others_die_and_join(tmp_path: Path) -> None:
    start = Starter(tmp_path, before="test_busy_ranks:long_work")
    elastic: dict[str, Any] = {
        "chaos": [fault("kill", 2, 6, "reduce")],
        "hang_timeout_s": HANG_S,
    }
    try:
        run = start(
            parallel={"data": 3},
            train={**TRAIN, "steps": 40},
            model=MODEL,
            elastic=pace(elastic, 0.15),
        )
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    assert slow_parts(run.root) == {"run", "report"}
    assert [lost["rank"] for lost in run.events("rank_lost")] == [2], run.events("rank_lost")


def test_a_rank_that_computes_for_ever_is_found_and_its_step_is_named(tmp_path: Path) -> None:
    start = Starter(tmp_path, before="test_busy_ranks:endless_step")
    try:
        run = start(
            train={**TRAIN, "steps": 10},
            model=MODEL,
            parallel={"data": 2},
            elastic={"hang_timeout_s": HANG_S, "startup_grace_s": 5.0, "respawn": False},
        )
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    (lost,) = run.events("rank_lost")
    assert lost["rank"] == 1
    assert lost["cause"].startswith("hung: rank 0 has waited")
    assert " in step 6: " in lost["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["save", "load", "evaluate"])
def test_a_rank_that_hangs_within_such_work_is_killed_when_its_excuse_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    before = {"save": "a_save", "load": "a_load", "evaluate": "an_evaluation"}[work]
    start = Starter(tmp_path, before=f"test_busy_ranks:hang_in_{before}")
    sections: dict[str, Any] = {
        "parallel": {"data": 2},
        "checkpoint": {"every": 4, "timeout_s": 3.0},
        "train": {**TRAIN, "eval_every": 6, "eval_batches": 1},
        "model": MODEL,
        "elastic": {"hang_timeout_s": HANG_S, "startup_grace_s": 5.0},
    }
    try:
        if work == "load":
            stop = {"train": {**sections["train"], "stop_after": 8}}
            first = start(name="run", **sections | stop)
            assert first.finish() == 0, first.output()
        run = start(name="run", **sections)
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    (path,) = run.root.glob("incidents/evidence-*-hung.json")
    evidence = read_evidence(path)
    assert evidence.rank == 1
    assert f"it said that it would {work}" in evidence.reason
    assert evidence.place.endswith("in _hang_once")
    if work != "load":  # which is before the first ranks train together
        assert [loss["rank"] for loss in run.events("rank_lost")] == [1]


@pytest.mark.slow
def test_ranks_that_hang_in_the_same_work_are_killed_though_none_waits(tmp_path: Path) -> None:
    start = Starter(tmp_path, before="test_busy_ranks:all_hang_in_an_evaluation")
    try:
        run = start(
            parallel={"data": 2},
            train={**TRAIN, "eval_every": 6, "eval_batches": 1},
            model=MODEL,
            elastic={"hang_timeout_s": HANG_S, "startup_grace_s": 5.0, "respawn": False},
        )
        assert run.finish() != 0, run.output()
    finally:
        start.close()
    found = map(read_evidence, run.root.glob("incidents/evidence-*-hung.json"))
    told = {evidence.rank: evidence.reason for evidence in found}
    assert "it said that it would evaluate, and has done so" in told[min(told)]


@pytest.mark.slow
def test_no_rank_is_lost_because_it_compiles(tmp_path: Path) -> None:
    start = Starter(tmp_path, before="test_busy_ranks:slow_compiler")
    try:
        run = start(
            parallel={"data": 2},
            train={**TRAIN, "compile": True},
            model=MODEL,
            elastic={"hang_timeout_s": HANG_S},
        )
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    assert slow_parts(run.root) == {"compile"}
    assert not run.events("rank_lost")
