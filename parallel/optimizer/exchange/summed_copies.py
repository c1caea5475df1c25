"""Gradients of weights that a stage replica has several copies of, each with a part of it.

Norms and other replicated weights see a part of the tokens on each rank of a tensor group. The
parts are added, in member order, before the sums travel to owners. Collective over the replica;
exact-mode safe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer, Segment


def summed_segments(buffer: ParameterBuffer) -> tuple[Segment, ...]:
    """The segments whose copies see a part of the gradient each. Pure."""
    return tuple(segment for segment in buffer.segments if segment.spec.summed)


def sum_over_copies(
    buffer: ParameterBuffer, accumulator: GradientAccumulator, shards: Communicator
) -> int:
    """Add the partial gradients of a stage replica's copies, in member order: equal on each copy.

    Collective over `shards`, the ranks of the stage replica.

    Returns:
        Flags raised while adding (integer overflow).
    """
    segments = summed_segments(buffer) if shards.size > 1 else ()
    if not segments:
        return 0
    views = [_sums_of(accumulator, segment) for segment in segments]
    mine = torch.cat(views)
    parts = [torch.empty_like(mine) for _ in range(shards.size)]
    shards.all_gather(parts, mine).wait()
    flags, start = 0, 0
    for segment, view in zip(segments, views, strict=True):
        stop = start + segment.spec.elements
        summed = [parts[index][start:stop] for index in segment.spec.summed]
        total = summed[0].clone()
        for part in summed[1:]:
            flags |= accumulator.add_to(total, part)
        view.copy_(total)
        start = stop
    return flags


def _sums_of(accumulator: GradientAccumulator, segment: Segment) -> Tensor:
    """The sums of a segment that this rank keeps whole: a flat view."""
    return accumulator.part(segment.offset, segment.offset + segment.spec.elements)


class OwnParts:
    """Copies of this rank's own parts, so that an interrupted addition can be undone. Local."""

    def __init__(self, buffer: ParameterBuffer, accumulator: GradientAccumulator) -> None:
        """Allocate the copies."""
        self._parts = [_sums_of(accumulator, segment) for segment in summed_segments(buffer)]
        self._kept: list[Tensor] | None = None

    def begin_step(self) -> None:
        """Begin a step: sums are added anew, and there is nothing to undo."""
        self._kept = None

    def keep(self) -> None:
        """Copy the parts, because they are about to be added."""
        self._kept = [part.clone() for part in self._parts]

    def restore(self) -> None:
        """Undo an addition that has begun, if any: the sums are this rank's own again."""
        for part, own in zip(self._parts, self._kept or (), strict=self._kept is not None):
            part.copy_(own)
        self._kept = None
