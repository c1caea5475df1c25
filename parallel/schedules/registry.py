"""Schedules: which rank computes what, in which order; the entrance to `holdfast.parallel.schedules`.

A schedule is generated for the pipeline indices of one replica, gets its messages, is checked and is
simulated, all as data and without torch or a process group:

    programs = dict(enumerate(compute_programs("1f1b", pipeline=4, virtual=1, micro_batches=8)))
    placed = placement("1f1b", pipeline=4, virtual=1)
    programs = with_messages(programs, lambda chunk, micro_batch: placed[chunk])
    check_programs(programs, chunks=4, micro_batches=range(8))
    simulate(programs, cost=unit_cost()).bubble
"""

from __future__ import annotations

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules.actions import (
    Action,
    Op,
    Program,
    parse_programs,
    peak_in_flight,
    render_programs,
)
from holdfast.parallel.schedules.checker import check_programs
from holdfast.parallel.schedules.drawing import draw
from holdfast.parallel.schedules.list_scheduler import list_schedule
from holdfast.parallel.schedules.messages import with_messages
from holdfast.parallel.schedules.orders import (
    forward_sequence,
    gpipe,
    interleaved,
    one_forward_one_backward,
)
from holdfast.parallel.schedules.simulator import Span, Timeline, simulate, unit_cost
from holdfast.parallel.schedules.zero_bubble import zb_h1, zb_v

__all__ = [
    "SCHEDULES",
    "Action",
    "Op",
    "Program",
    "Span",
    "Timeline",
    "check_programs",
    "compute_programs",
    "draw",
    "forward_only",
    "list_schedule",
    "parse_programs",
    "peak_in_flight",
    "placement",
    "render_programs",
    "simulate",
    "unit_cost",
    "with_messages",
]

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v")


def placement(schedule: str, pipeline: int, virtual: int) -> tuple[int, ...]:
    """The pipeline index of every chunk, in forward order.

    Chunks go round the pipeline `virtual` times; with "zb-v" they go down it and back up, so that
    the first and the last chunk are on index 0.

    Raises:
        ScheduleError: the schedule does not exist or cannot have this many chunks.
    """
    _validate(schedule, pipeline, virtual)
    if schedule == "zb-v":
        return (*range(pipeline), *reversed(range(pipeline)))
    return tuple(chunk % pipeline for chunk in range(pipeline * virtual))


def compute_programs(
    schedule: str, pipeline: int, virtual: int, micro_batches: int
) -> tuple[Program, ...]:
    """The compute actions of each pipeline index, without messages.

    Args:
        schedule: one of `SCHEDULES`.
        pipeline: ranks that hold the chunks of one replica.
        virtual: chunks per rank.
        micro_batches: of this replica, any number from 1; actions name them 0..micro_batches-1.
    Returns:
        One program per pipeline index.
    Raises:
        ScheduleError: the schedule does not exist, or does not allow these numbers.
    """
    _validate(schedule, pipeline, virtual)
    _validate_count("micro_batches", micro_batches)
    indices = range(pipeline)
    match schedule:
        case "gpipe":
            return tuple(gpipe(i, pipeline, virtual, micro_batches) for i in indices)
        case "1f1b":
            return tuple(one_forward_one_backward(i, pipeline, micro_batches) for i in indices)
        case "interleaved-1f1b":
            return tuple(interleaved(i, pipeline, virtual, micro_batches) for i in indices)
        case "zb-h1":
            return tuple(zb_h1(i, pipeline, micro_batches) for i in indices)
        case _:
            return zb_v(pipeline, micro_batches)


def forward_only(
    schedule: str, pipeline: int, virtual: int, micro_batches: int
) -> tuple[Program, ...]:
    """The forwards of each pipeline index, without messages, for evaluation.

    Args and errors are those of `compute_programs`; the chunks lie where `schedule` places them.
    """
    placed = placement(schedule, pipeline, virtual)
    _validate_count("micro_batches", micro_batches)
    return tuple(forward_sequence(i, pipeline, placed, micro_batches) for i in range(pipeline))


def _validate(schedule: str, pipeline: int, virtual: int) -> None:
    if schedule not in SCHEDULES:
        raise ScheduleError(
            f"parallel.schedule = {schedule!r} does not exist; choose one of {', '.join(SCHEDULES)}"
        )
    _validate_count("parallel.pipeline", pipeline)
    _validate_count("parallel.virtual", virtual)
    if schedule in ("1f1b", "zb-h1") and virtual != 1:
        several = "interleaved-1f1b" if schedule == "1f1b" else "zb-v with parallel.virtual = 2"
        raise ScheduleError(
            f"parallel.schedule = {schedule!r} has one chunk per rank, but parallel.virtual = "
            f"{virtual}; set parallel.virtual = 1, or use {several}"
        )
    if schedule == "zb-v" and virtual != 2:
        raise ScheduleError(
            f"parallel.schedule = 'zb-v' has two chunks per rank, but parallel.virtual = {virtual}; "
            "set parallel.virtual = 2, or use zb-h1 with parallel.virtual = 1"
        )


def _validate_count(name: str, count: int) -> None:
    if count < 1:
        raise ScheduleError(f"{name} = {count} is too small; use 1 or more")
