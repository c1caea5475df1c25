"""The table of pipeline schedules. A new one is a file with its `Schedule` and a line here.

A schedule is generated for the pipeline indices of one replica, gets its messages, is checked and
is simulated, all as data and without torch or a process group:

    programs = dict(enumerate(compute_programs("1f1b", pipeline=4, virtual=1, micro_batches=8)))
    placed = placement("1f1b", pipeline=4, virtual=1)
    programs = with_messages(programs, lambda chunk, micro_batch: placed[chunk])
    check_programs(programs, chunks=4, micro_batches=range(8))
    simulate(programs, cost=unit_cost()).bubble
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.parallel.errors import ScheduleError, number_fault, unknown_name
from holdfast.parallel.schedules.actions import Program
from holdfast.parallel.schedules.orders import (
    GPIPE,
    INTERLEAVED,
    ONE_FORWARD_ONE_BACKWARD,
    forward_sequence,
    in_stretches,
)
from holdfast.parallel.schedules.schedule import Schedule
from holdfast.parallel.schedules.zero_bubble import ZB_H1, ZB_V

SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": GPIPE,
    "1f1b": ONE_FORWARD_ONE_BACKWARD,
    "interleaved-1f1b": INTERLEAVED,
    "zb-h1": ZB_H1,
    "zb-v": ZB_V,
}
"""The allowed values of `parallel.schedule`."""


def placement(schedule: str, pipeline: int, virtual: int) -> tuple[int, ...]:
    """The pipeline index of every chunk, in forward order.

    Args:
        schedule: a name in `SCHEDULES`.
        pipeline: the number of ranks of the pipeline, 1 or more.
        virtual: the number of model chunks per pipeline rank, as many as the schedule allows.
    Raises:
        ScheduleError: the schedule does not exist or cannot have this many chunks.
    """
    return _checked(schedule, pipeline, virtual).placement(pipeline, virtual)


def compute_programs(
    schedule: str, pipeline: int, virtual: int, micro_batches: int, stretches: int = 1
) -> tuple[Program, ...]:
    """The compute actions of each pipeline index, without messages.

    Args:
        schedule, pipeline, virtual: as for `placement`.
        micro_batches: the number of micro-batches of one replica, 1 or more; actions name them 0 to
            micro_batches - 1.
        stretches: the equal parts in which a sequence passes the chunks, 1 or more.
    Returns:
        One program per pipeline index.
    Raises:
        ScheduleError: the schedule does not exist, or does not allow these numbers.
    """
    found = _checked(schedule, pipeline, virtual)
    _check_count("micro_batches", micro_batches)
    if stretches == 1:
        return found.programs(pipeline, virtual, micro_batches)
    return _stretched(schedule, stretches)(pipeline, virtual, micro_batches, stretches)


def check_stretches(schedule: str, stretches: int) -> None:
    """Check that sequences may pass in so many stretches.

    Args:
        schedule: a name in `SCHEDULES`.
    Raises:
        ScheduleError: the schedule takes them as a whole, or the number is below 1.
    """
    if stretches != 1:
        _stretched(schedule, stretches)


def _stretched(
    schedule: str, stretches: int
) -> Callable[[int, int, int, int], tuple[Program, ...]]:
    _check_count("parallel.stretches", stretches)
    found = SCHEDULES[schedule].stretched
    if found is None:
        able = ", ".join(name for name, other in SCHEDULES.items() if other.stretched)
        raise ScheduleError(
            f"parallel.stretches = {stretches}: parallel.schedule = {schedule!r} takes sequences "
            f"as a whole; use one of {able}, or set parallel.stretches = 1"
        )
    return found


def forward_only(
    schedule: str, pipeline: int, virtual: int, micro_batches: int, stretches: int = 1
) -> tuple[Program, ...]:
    """The forwards of each pipeline index, without messages, for evaluation.

    Arguments and errors are those of `compute_programs`. Chunks lie where `schedule` places them.
    """
    placed = placement(schedule, pipeline, virtual)
    _check_count("micro_batches", micro_batches)
    return tuple(
        in_stretches(forward_sequence(i, pipeline, placed, micro_batches), stretches)
        for i in range(pipeline)
    )


def _checked(name: str, pipeline: int, virtual: int) -> Schedule:
    """The schedule of a name, checked to allow these numbers."""
    found = SCHEDULES.get(name)
    if found is None:
        raise ScheduleError(unknown_name("parallel.schedule", name, SCHEDULES))
    _check_count("parallel.pipeline", pipeline)
    _check_count("parallel.virtual", virtual)
    only = found.chunks_per_rank
    if only is not None and virtual != only:
        chunks = {1: "one chunk", 2: "two chunks"}.get(only, f"{only} chunks")
        raise ScheduleError(
            f"parallel.schedule = {name!r} has {chunks} per rank, but parallel.virtual = "
            f"{virtual}; set parallel.virtual = {only}"
            + (f", or use {found.alternative}" if found.alternative else "")
        )
    return found


def _check_count(name: str, count: int) -> None:
    if fault := number_fault(name, count, 1):
        raise ScheduleError(fault)
