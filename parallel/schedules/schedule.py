"""The type of a pipeline schedule: where chunks lie, and the order of each pipeline index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.parallel.schedules.actions import Program


def round_robin(pipeline: int, virtual: int) -> tuple[int, ...]:
    """The pipeline index of every chunk, in forward order, if chunks go round `virtual` times."""
    return tuple(range(pipeline)) * virtual


@dataclass(frozen=True, slots=True)
class Schedule:
    """One kind of pipeline schedule; registry.py has the table of them by name."""

    programs: Callable[[int, int, int], tuple[Program, ...]]
    """(pipeline, virtual, micro-batches) -> the compute actions of each pipeline index, for one
    replica's micro-batches 0 to m - 1. All three numbers are 1 or more."""
    stretched: Callable[[int, int, int, int], tuple[Program, ...]] | None = None
    """(pipeline, virtual, micro-batches, stretches) -> likewise, for sequences that pass the chunks
    in several stretches; None: they pass as a whole."""
    chunks_per_rank: int | None = None
    """The only allowed `parallel.virtual`; None: any."""
    alternative: str = ""
    """The schedule for another number of chunks per rank, which an error recommends."""
    placement: Callable[[int, int], tuple[int, ...]] = round_robin
    """(pipeline, virtual) -> the pipeline index of every chunk, in forward order."""
