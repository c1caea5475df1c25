"""Partial gradient sums of an interrupted step, and the micro-batches they lack. Pure.

Integer sums do not depend on the order of addition, so the sums of the surviving ranks stay valid
under any plan. Only micro-batches that some parameter lacks are recomputed, and a parameter that
includes one already skips it (ReCoVer, 2026, also keeps micro-batch gradients). The unit is the
parameter, not the layer: the ranks of a tensor group may be interrupted at different points of one
backward pass. Of a parameter the unit is a slice of a micro-batch: slice q of micro-batch m has the
number m times the slices of a sequence + q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.parallel.plan import Plan
from holdfast.parallel.reading import Count, of_kind

ParameterKey = tuple[int, int, int]
"""A parameter: the part that it is of, its layer, and its row in the table of these."""
Included = Mapping[ParameterKey, frozenset[int]]
"""The units in the sums of each parameter, of one rank or of all that have it together.

Sums of rows that parts share have the units of each of these parts."""
_AsData = list[tuple[Count, Count, list[Count], list[Count]]]


@dataclass(frozen=True, slots=True)
class InterruptedStep:
    """An interrupted step, and the units in the sums of the surviving ranks."""

    step: int
    """The step, counted from 0."""
    included: Included
    slices: int = 1
    """The slices of a sequence."""

    def missing(self, plan: Plan, micro_batches: int) -> frozenset[int]:
        """The micro-batches of which some parameter lacks a slice."""
        units = frozenset(range(micro_batches * self.slices))
        done = units
        for layer, spec in enumerate(plan.layers):
            for part, rows in enumerate(spec.parameters):
                for row in range(len(rows)):
                    done &= self.included.get((part, layer, row), frozenset())
        return frozenset(unit // self.slices for unit in units - done)

    def slices_in(self, key: ParameterKey, micro_batch: int) -> frozenset[int]:
        """The slices of a micro-batch that a parameter's sums include already."""
        found = self.included.get(key, frozenset())
        first = micro_batch * self.slices
        return frozenset(q for q in range(self.slices) if first + q in found)


NOT_INTERRUPTED = InterruptedStep(-1, {})
"""The value for a step that was not interrupted."""


def keeps_sums(plan: Plan, following: Plan, rank: int, fresh: frozenset[int]) -> bool:
    """Whether a rank's sums are valid under the next plan: the same layers, no part less.

    Args:
        fresh: the ranks with a new process, also one under an old rank number.
    """
    if rank in fresh or None in (p.stage_replicas.find(rank) for p in (plan, following)):
        return False
    if plan.spreads_experts and not all(
        set(plan.experts_of(rank, layer)) <= set(following.experts_of(rank, layer))
        for layer in plan.layers_at(rank)
    ):
        return False
    return set(plan.parts_of(rank)) <= set(following.parts_of(rank)) and (
        [plan.layers_of(c) for c in plan.chunks_of(rank)]
        == [following.layers_of(c) for c in following.chunks_of(rank)]
    )


def included_after_change(
    plan: Plan, following: Plan, included: Mapping[int, Included], fresh: frozenset[int]
) -> Included:
    """The units in the sums that stay valid under the next plan.

    Args:
        included: the units by rank, for the ranks that were in the same step.
        fresh: as for `keeps_sums`.
    """
    found: dict[ParameterKey, frozenset[int]] = {}
    for rank, rows in included.items():
        if keeps_sums(plan, following, rank, fresh):
            for key, numbers in rows.items():
                found[key] = found.get(key, frozenset()) | numbers
    return found


def included_to_data(included: Included) -> list[tuple[int, int, list[int], list[int]]]:
    """JSON values: part, layer, table rows, and the units in the sums of all of these."""
    found: dict[tuple[int, int, frozenset[int]], list[int]] = {}
    for (part, layer, row), numbers in sorted(included.items()):
        if numbers:
            found.setdefault((part, layer, numbers), []).append(row)
    return [(part, layer, rows, sorted(units)) for (part, layer, units), rows in found.items()]


def included_from_data(plain: Any) -> dict[ParameterKey, frozenset[int]]:
    """The inverse of `included_to_data`.

    Raises:
        ValueError: it is not what that returns.
    """
    return {
        (part, layer, row): frozenset(units)
        for part, layer, rows, units in of_kind(plain, _AsData)
        for row in rows
    }
