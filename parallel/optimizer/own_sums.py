"""A copy of this rank's own gradient sums, so that an interrupted reduction can be undone.

Local.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.reduction import Span


class OwnSums:
    """Copies of the sums that a reduction changes, made before it.

    The cost is memory and a copy of the size of the spans.
    """

    def __init__(self, accumulator: GradientAccumulator, changed: Iterable[Span]) -> None:
        """Allocate the copies.

        Args:
            changed: the spans that a reduction changes, in any order; they may overlap.
        """
        joined: list[Span] = []
        for span in sorted(set(changed), key=lambda s: s.start):
            if joined and span.start <= joined[-1].stop:
                joined[-1] = Span(joined[-1].start, max(span.stop, joined[-1].stop))
            else:
                joined.append(span)
        self._accumulator = accumulator
        sums = accumulator.sums
        self._kept = [(span, torch.empty_like(sums[span.start : span.stop])) for span in joined]
        self._are_kept = False

    def begin_step(self) -> None:
        """Begin a step: sums are added anew, and there is nothing to undo."""
        self._are_kept = False

    def keep(self) -> None:
        """Copy the sums, because a reduction begins."""
        for span, own in self._kept:
            own.copy_(self._accumulator.sums[span.start : span.stop])
        self._are_kept = True

    def restore(self) -> None:
        """Undo a reduction that has begun, if any: the sums are this rank's own again."""
        if self._are_kept:
            for span, own in self._kept:
                self._accumulator.sums[span.start : span.stop].copy_(own)
        self._are_kept = False
