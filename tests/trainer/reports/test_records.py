"""What a run writes: whole lines only, JSON that parses anywhere, traces that Perfetto's format
allows."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from holdfast.launch.launchers.display_process import _Follower
from holdfast.parallel.output import DiskWord, WholeFiles
from holdfast.parallel.pipeline.executor import ActionTimes
from holdfast.parallel.schedules import Action, Op
from holdfast.trainer.models import layer_specs
from holdfast.trainer.models.llama.family import LlamaConfig
from holdfast.trainer.reports.flops import step_flops, utilisation
from holdfast.trainer.reports.metrics import drop_after, last_step
from holdfast.trainer.reports.terminal.console import duration, sparkline
from holdfast.trainer.reports.trace import PhaseSpan, bubble_of, write_trace


def test_resuming_drops_the_lines_after_the_step(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_records_of_terabytes_are_refused_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    assert last_step(path) == 1
    os.truncate(path, 5 << 40)
    for read in (last_step, lambda path: drop_after(path, 1)):
        with pytest.raises(OSError, match="at most"):
            read(path)


def times() -> ActionTimes:
    actions = [
        Action(Op.FORWARD, 0, 4),
        Action(Op.SEND_FORWARD, 0, 4, 2),
        Action(Op.RECEIVE_BACKWARD, 0, 4, 2),
        Action(Op.BACKWARD, 0, 4),
    ]
    return ActionTimes(actions, [1.0, 2.0, 2.1, 4.0], [2.0, 2.1, 4.0, 5.0])


def test_traces_hold_every_action_and_the_bubble(tmp_path: Path) -> None:
    phases = [PhaseSpan("compute", 1.0, 5.0), PhaseSpan("reduce", 5.0, 5.5)]
    assert bubble_of(times(), phases[0]) == pytest.approx(0.5)
    files = WholeFiles(tmp_path, DiskWord())
    paths = [write_trace(files, rank, f"rank {rank}", 7, phases, times()) for rank in (0, 1)]
    events = []
    for path in paths:
        with gzip.open(path, "rt") as file:
            events += json.load(file)["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    slices = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert {event["name"] for event in slices} == {
        "F4",
        "SEND_F4",
        "RECV_B4",
        "B4",
        "compute",
        "reduce",
    }
    compute = next(event for event in slices if event["name"] == "compute")
    assert compute["args"]["bubble"] == pytest.approx(0.5)
    assert compute["dur"] == pytest.approx(4e6)


def test_operations_are_six_per_parameter_and_token() -> None:
    model = LlamaConfig(
        family="llama", layers=2, hidden=64, intermediate=128, heads=4, kv_heads=4, vocab=100
    )
    layers = layer_specs(
        model,
        tensor=1,
        sequence_parallel=False,
        seq_len=16,
        micro_batch=2,
        precision="fp32",
        recompute="none",
    )
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 100
    tokens = 3 * 2 * 16
    attention = 6 * 2 * 64 * 16
    assert step_flops(layers, 3) == tokens * (6 * matrices + attention)
    assert utilisation(989e12, 1.0, 2, "NVIDIA H200 141GB") == pytest.approx(0.5)
    assert utilisation(1.0, 1.0, 1, "some CPU") is None


def test_shown_numbers() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
    assert sparkline([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert len(sparkline([float(i) for i in range(1000)], 60)) <= 60


def test_who_follows_records_bears_that_a_run_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = _Follower(path, 0)

    def write(first: int, last: int, loss: str) -> None:
        with path.open("a") as file:
            file.writelines(f'{{"step": {s}, "loss": {loss}}}\n' for s in range(first, last))

    write(1, 6, "1.5")
    assert [line["step"] for line in follower.lines()] == [1, 2, 3, 4, 5]
    drop_after(path, 2)
    write(3, 20, "1.25")
    steps = [line["step"] for line in follower.lines()]
    assert steps == list(range(steps[0], 20))
    assert steps[0] in (5, 6)  # lines of another length
    drop_after(path, 9)
    assert list(follower.lines()) == []
    write(10, 12, "1.0")
    assert [line["step"] for line in follower.lines()] == [10, 11]
