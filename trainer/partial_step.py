"""What is left of an interrupted step: which micro-batches are in the sums of which layers. Pure.

Sums are integers, so what the survivors have added stays valid under any plan. Only micro-batches that some
layer has lost are computed again, and layers that have them already add nothing (ReCoVer, 2026, keeps
micro-batch gradients likewise). With tensor parallelism, or sums in floats, the whole step is computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from holdfast.parallel.plan import Plan

Counted = Mapping[int, frozenset[int]]
"""Layer -> the micro-batches that are in its sums."""


@dataclass(frozen=True, slots=True)
class Redo:
    """How an interrupted step is computed again."""

    step: int
    """Counted from 0."""
    covered: Counted
    """What the survivors' sums hold together."""

    def todo(self, layers: int, micro_batches: int) -> frozenset[int]:
        """The micro-batches that some layer lacks."""
        return frozenset(
            number
            for number in range(micro_batches)
            if any(number not in self.covered.get(layer, ()) for layer in range(layers))
        )


def keeps_sums(plan: Plan, following: Plan, rank: int) -> bool:
    """Whether a rank's sums serve under the next plan: it holds the same layers, without a tensor group."""
    return (
        plan.cells.tensor == 1
        and following.cells.find(rank) is not None
        and plan.cells.find(rank) is not None
        and [plan.layers_of(c) for c in plan.chunks_of(rank)]
        == [following.layers_of(c) for c in following.chunks_of(rank)]
    )


def covered_layers(
    plan: Plan, following: Plan, counted: Mapping[int, Counted]
) -> dict[int, frozenset[int]]:
    """What is in the sums that go on.

    Args:
        counted: by rank, of those that were in the same step.
    """
    found: dict[int, frozenset[int]] = {}
    for rank, layers in counted.items():
        if keeps_sums(plan, following, rank):
            for layer, numbers in layers.items():
                found[layer] = found.get(layer, frozenset()) | numbers
    return found


def merged(
    first: Counted, second: Iterable[tuple[int, Iterable[int]]]
) -> dict[int, frozenset[int]]:
    """The union of what two attempts have counted."""
    found = dict(first)
    for layer, numbers in second:
        found[layer] = found.get(layer, frozenset()) | frozenset(numbers)
    return found


def counted_to_data(counted: Counted) -> dict[str, list[int]]:
    """As JSON values."""
    return {str(layer): sorted(numbers) for layer, numbers in counted.items() if numbers}


def counted_from_data(plain: Mapping[str, list[int]]) -> dict[int, frozenset[int]]:
    """What `counted_to_data` wrote."""
    return {int(layer): frozenset(numbers) for layer, numbers in plain.items()}
