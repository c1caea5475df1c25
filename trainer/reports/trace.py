"""Chrome traces of chosen steps, one gzipped file per rank, for ui.perfetto.dev."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.parallel.output import WholeFiles
from holdfast.parallel.pipeline import ActionTimes
from holdfast.parallel.schedules import Op

_COMPUTE = {Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT}
_LANES = {"step": 0, "compute": 1, "messages": 2}


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A part of a step on one rank; seconds on `time.perf_counter`'s clock."""

    name: str
    start_s: float
    stop_s: float


def bubble_of(times: ActionTimes, phase: PhaseSpan) -> float:
    """The share of a rank's compute phase without computation."""
    busy = sum(
        stop - start
        for action, start, stop in zip(times.actions, times.starts_s, times.stops_s, strict=True)
        if action.op in _COMPUTE
    )
    length = phase.stop_s - phase.start_s
    return 1.0 - busy / length if length > 0 else 0.0


def trace_events(
    rank: int,
    label: str,
    step: int,
    phases: Sequence[PhaseSpan],
    times: ActionTimes,
    clock_s: float,
) -> list[dict[str, Any]]:
    """Complete events ("ph": "X") in microseconds: phases, compute and messages on a lane each.

    Args:
        label: the name of the rank, e.g. "rank 3 (stage 1, replica 0)".
        clock_s: Unix time minus `time.perf_counter`, which gives all machines one time axis.
    """
    events: list[dict[str, Any]] = [
        _named("process_name", rank, 0, label),
        *(_named("thread_name", rank, lane, name) for name, lane in _LANES.items()),
    ]
    for phase in phases:
        arguments: dict[str, Any] = {"step": step}
        if phase.name == "compute":
            arguments["bubble"] = round(bubble_of(times, phase), 6)
        events.append(
            _slice(
                phase.name, rank, _LANES["step"], phase.start_s, phase.stop_s, clock_s, arguments
            )
        )
    for action, start, stop in zip(times.actions, times.starts_s, times.stops_s, strict=True):
        lane = "compute" if action.op in _COMPUTE else "messages"
        arguments = {"chunk": action.chunk, "micro_batch": action.micro_batch}
        if action.stretch is not None:
            arguments["stretch"] = action.stretch
        if action.peer is not None:
            arguments["peer"] = action.peer
        name = f"{action.op.value}{action.label}"
        events.append(_slice(name, rank, _LANES[lane], start, stop, clock_s, arguments))
    return events


def write_trace(
    files: WholeFiles,
    rank: int,
    label: str,
    step: int,
    phases: Sequence[PhaseSpan],
    times: ActionTimes,
) -> Path:
    """Write one rank's trace of one step. Returns the file. Local."""
    path = files.folder / f"step-{step:08d}.rank-{rank}.json.gz"
    clock_s = time.time() - time.perf_counter()
    events = trace_events(rank, label, step, phases, times, clock_s)
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    files.put(path, gzip.compress(text.encode()))
    return path


def _named(kind: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": lane, "args": {"name": name}}


def _slice(
    name: str,
    rank: int,
    lane: int,
    start_s: float,
    stop_s: float,
    clock_s: float,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": rank,
        "tid": lane,
        "ts": (start_s + clock_s) * 1e6,
        "dur": (stop_s - start_s) * 1e6,
        "args": arguments,
    }
