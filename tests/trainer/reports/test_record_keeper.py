"""The records of a run are complete, each step once, whichever rank writes them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdfast.trainer.config.sections import TrainConfig
from holdfast.trainer.reports.events import EventFile
from holdfast.trainer.reports.metrics import StepMetrics
from holdfast.trainer.reports.record_keeper import RecordKeeper
from holdfast.trainer.reports.reporter import Reporter
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.step import Outcome
from holdfast.trainer.worlds.world import WorldInfo


def metrics(step: int, world: int = 2) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=1.0 / step,
        loss_hex=(1.0 / step).hex(),
        grad_norm=1.0,
        grad_norm_hex=(1.0).hex(),
        lr=0.1,
        tokens=step,
        step_s=1.0,
        tokens_per_s=1.0,
        world=world,
        generation=1,
    )


def keeper(
    run: RunDirectory, *, writes: bool, first: int = 0, tensorboard: bool = False
) -> RecordKeeper:
    events = EventFile(run.events)
    return RecordKeeper(run, events, tensorboard=tensorboard, first=first, writes=writes)


def steps(run: RunDirectory) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def test_the_next_writer_completes_what_a_lost_one_has_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lost, other = keeper(run, writes=True), keeper(run, writes=False)
    for step in (1, 2, 3):
        lost.step(metrics(step), {})
        other.step(metrics(step), {})
    other.step(metrics(4), {})
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # the writer dies within its line
    assert not other.writes
    other.change(writes=True)
    other.step(metrics(5), {})
    other.close()
    assert steps(run) == [1, 2, 3, 4, 5]


def test_a_rank_that_no_longer_writes_leaves_the_files_to_others(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    made = keeper(run, writes=True)
    made.step(metrics(1), {})
    made.change(writes=False)
    made.step(metrics(2), {})
    made.event("straggler", rank=1)
    assert steps(run) == [1]
    assert not run.events.exists()


def test_steps_that_are_repeated_are_recorded_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    made = keeper(run, writes=True)
    for step in (1, 2, 3, 4):
        made.step(metrics(step), {})
    made.roll_back(2)
    assert steps(run) == [1, 2]
    for step in (3, 4, 5):
        made.step(metrics(step, world=1), {})
    made.close()
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["step"], line["world"]) for line in lines] == [
        (1, 2),
        (2, 2),
        (3, 1),
        (4, 1),
        (5, 1),
    ]
    resumed = keeper(run, writes=True, first=4)
    resumed.close()
    assert steps(run) == [1, 2, 3, 4]


class Training:
    """What a reporter reads of a training."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        replicas = SimpleNamespace(ranks=ranks, size=len(ranks), find=lambda rank: None)
        self.plan = SimpleNamespace(stage_replicas=replicas, generation=3, layers=())
        log = SimpleNamespace(tensorboard=False, trace_steps=[], every=1)
        train = TrainConfig(steps=9, global_batch=4, seq_len=16)
        numerics = SimpleNamespace(spike_window=0)
        self.config = SimpleNamespace(log=log, train=train, numerics=numerics)
        self.device, self.offloader = torch.device("cpu"), None


def test_a_reporter_times_steps_by_its_clock_and_reports_each_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    now = 10.0
    training: Any = Training((1, 2))
    world = WorldInfo(1, 2, 1, 2, 0, "127.0.0.1", 1, False)
    reporter = Reporter(
        training, world, run, [], EventFile(run.events), shown=False, clock=lambda: now
    )
    outcome = Outcome(2.0, 1.0, 0, 0)
    now = 10.5
    reporter.step(0, outcome, 0.1, (), None, {})
    reporter.step(0, outcome, 0.1, (), None, {})
    now = 12.5
    reporter.step(1, outcome, 0.1, (), None, {"held_out": 1.5})
    now = 13.0
    reporter.finished("ab" * 32)
    reporter.close()
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["step"], line["step_s"], line["tokens_per_s"]) for line in lines] == [
        (1, 0.5, 128.0),
        (2, 2.0, 32.0),
    ]
    assert [(line["world"], line["generation"], line["tokens"]) for line in lines] == [
        (2, 3, 64),
        (2, 3, 128),
    ]
    evaluated, finished = map(json.loads, run.events.read_text().splitlines())
    assert (evaluated["event"], evaluated["step"], evaluated["loss"]) == ("evaluated", 2, 1.5)
    assert (finished["event"], finished["total_s"]) == ("run_finished", 3.0)


def test_tensorboard_shows_each_step_once_though_a_run_goes_on_from_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, now_s = RunDirectory(tmp_path), time.time()
    for start, (first, last) in enumerate([(0, 7), (4, 6), (5, 8)]):
        monkeypatch.setattr(time, "time", lambda s=now_s - 86400 * start: s)  # it is set back
        records = keeper(run, writes=True, first=first, tensorboard=True)
        for step in range(first + 1, last + 1):
            records.step(metrics(step, world=start), {"start": start})
        records.close()
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    shown = [(scalar.step, scalar.value) for scalar in board.Scalars("start")]
    assert shown == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 2), (7, 2), (8, 2)]
