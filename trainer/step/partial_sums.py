"""What is left of an interrupted step: which micro-batches are in the sums of which parameters. Pure.

Sums of integers are the same in any order, so what the survivors have added stays valid under any plan. Only
micro-batches that some parameter has lost are computed again, and parameters that have them already add nothing
(ReCoVer, 2026, keeps micro-batch gradients likewise). Parameters, not layers, are told apart because a tensor group
may be interrupted in the midst of a backward pass, each of its ranks at another place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.parallel.plan import Plan

Place = tuple[int, int]
"""A parameter: its layer, and its row in the layer's table."""
Counted = Mapping[Place, frozenset[int]]
"""The micro-batches that are in the sums of each parameter of one rank."""
Covered = Mapping[int, Counted]
"""By tensor-parallel index, what the sums of all ranks hold together."""


@dataclass(frozen=True, slots=True)
class Redo:
    """How an interrupted step is computed again."""

    step: int
    """Counted from 0."""
    covered: Covered
    """What the survivors' sums hold together."""

    def todo(self, plan: Plan, micro_batches: int) -> frozenset[int]:
        """The micro-batches that some parameter lacks."""
        done = frozenset(range(micro_batches))
        for index in range(plan.stage_replicas.tensor):
            counted = self.covered.get(index, {})
            for layer, spec in enumerate(plan.layers):
                for row in range(len(spec.parameters[index])):
                    done &= counted.get((layer, row), frozenset())
        return frozenset(range(micro_batches)) - done

    def has(self, tensor_index: int, place: Place, micro_batch: int) -> bool:
        """Whether a parameter has a micro-batch's gradient already."""
        return micro_batch in self.covered.get(tensor_index, {}).get(place, ())


NOTHING = Redo(-1, {})
"""Of a step that was not interrupted."""


def keeps_sums(plan: Plan, following: Plan, rank: int, fresh: frozenset[int]) -> bool:
    """Whether a rank's sums serve under the next plan: it holds the same layers in the same tensor group.

    Args:
        fresh: ranks that are new processes, whatever their number.
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


def covered_places(
    plan: Plan, following: Plan, counted: Mapping[int, Counted], fresh: frozenset[int]
) -> Covered:
    """What is in the sums that go on.

    Args:
        counted: by rank, of those that were in the same step.
        fresh: as for `keeps_sums`.
    """
    found: dict[int, dict[Place, frozenset[int]]] = {}
    for rank, places in counted.items():
        if keeps_sums(plan, following, rank, fresh):
            mine = found.setdefault(plan.stage_replicas.tensor_index(rank), {})
            for place, numbers in places.items():
                mine[place] = mine.get(place, frozenset()) | numbers
    return found


def counted_to_data(counted: Counted) -> dict[str, list[tuple[list[int], list[int]]]]:
    """As JSON values: by layer, rows of its table and the micro-batches that they have."""
    found: dict[str, dict[frozenset[int], list[int]]] = {}
    for (layer, row), numbers in sorted(counted.items()):
        if numbers:
            found.setdefault(str(layer), {}).setdefault(numbers, []).append(row)
    return {
        layer: [(rows, sorted(numbers)) for numbers, rows in groups.items()]
        for layer, groups in found.items()
    }


def counted_from_data(
    plain: Mapping[str, list[tuple[list[int], list[int]]]],
) -> dict[Place, frozenset[int]]:
    """What `counted_to_data` wrote."""
    return {
        (int(layer), row): frozenset(numbers)
        for layer, groups in plain.items()
        for rows, numbers in groups
        for row in rows
    }
