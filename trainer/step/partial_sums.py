"""Partial gradient sums of an interrupted step, and the micro-batches they lack. Pure.

Integer sums do not depend on the order of addition, so the sums of the surviving ranks stay valid
under any plan. Only micro-batches that some parameter lacks are recomputed, and a parameter that
includes one already skips it (ReCoVer, 2026, also keeps micro-batch gradients). The unit is the
parameter, not the layer: the ranks of a tensor group may be interrupted at different points of one
backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.parallel.plan import Plan
from holdfast.parallel.reading import Count, of_kind

ParameterKey = tuple[int, int]
"""A parameter: its layer, and its row in the layer's table."""
Included = Mapping[ParameterKey, frozenset[int]]
"""The micro-batches in the sums of each parameter of one rank."""
IncludedByShard = Mapping[int, Included]
"""By shard index: the micro-batches in the sums of all ranks together."""
_AsData = dict[str, list[tuple[list[Count], list[Count]]]]


@dataclass(frozen=True, slots=True)
class InterruptedStep:
    """An interrupted step, and the micro-batches in the sums of the surviving ranks."""

    step: int
    """The step, counted from 0."""
    included: IncludedByShard

    def missing(self, plan: Plan, micro_batches: int) -> frozenset[int]:
        """The micro-batches that some parameter lacks."""
        done = frozenset(range(micro_batches))
        for index in range(plan.stage_replicas.shards):
            included = self.included.get(index, {})
            for layer, spec in enumerate(plan.layers):
                for row in range(len(spec.parameters[index])):
                    done &= included.get((layer, row), frozenset())
        return frozenset(range(micro_batches)) - done

    def has(self, shard_index: int, key: ParameterKey, micro_batch: int) -> bool:
        """Whether a parameter's sums include a micro-batch already."""
        return micro_batch in self.included.get(shard_index, {}).get(key, ())


NOT_INTERRUPTED = InterruptedStep(-1, {})
"""The value for a step that was not interrupted."""


def keeps_sums(plan: Plan, following: Plan, rank: int, fresh: frozenset[int]) -> bool:
    """Whether a rank's sums are valid under the next plan: same layers, same tensor group.

    Args:
        fresh: the ranks with a new process, also one under an old rank number.
    """
    was, now = plan.stage_replicas.find(rank), following.stage_replicas.find(rank)
    if was is None or now is None:
        return False
    group = following.stage_replicas.stages[now.pipeline][now.data]
    return (
        group == plan.stage_replicas.stages[was.pipeline][was.data]
        and fresh.isdisjoint(group)
        and [plan.layers_of(c) for c in plan.chunks_of(rank)]
        == [following.layers_of(c) for c in following.chunks_of(rank)]
    )


def included_after_change(
    plan: Plan, following: Plan, included: Mapping[int, Included], fresh: frozenset[int]
) -> IncludedByShard:
    """The micro-batches in the sums that stay valid under the next plan.

    Args:
        included: the micro-batches by rank, for the ranks that were in the same step.
        fresh: as for `keeps_sums`.
    """
    found: dict[int, dict[ParameterKey, frozenset[int]]] = {}
    for rank, rows in included.items():
        if keeps_sums(plan, following, rank, fresh):
            mine = found.setdefault(plan.stage_replicas.shard_index(rank), {})
            for key, numbers in rows.items():
                mine[key] = mine.get(key, frozenset()) | numbers
    return found


def included_to_data(included: Included) -> dict[str, list[tuple[list[int], list[int]]]]:
    """JSON values: by layer, pairs of table rows and the micro-batches in their sums."""
    found: dict[str, dict[frozenset[int], list[int]]] = {}
    for (layer, row), numbers in sorted(included.items()):
        if numbers:
            found.setdefault(str(layer), {}).setdefault(numbers, []).append(row)
    return {
        layer: [(rows, sorted(numbers)) for numbers, rows in groups.items()]
        for layer, groups in found.items()
    }


def included_from_data(plain: Any) -> dict[ParameterKey, frozenset[int]]:
    """The inverse of `included_to_data`.

    Raises:
        ValueError: it is not what that returns.
    """
    return {
        (int(layer), row): numbers
        for layer, groups in of_kind(plain, _AsData).items()
        for rows, listed in groups
        for numbers in [frozenset(listed)]
        for row in rows
    }
