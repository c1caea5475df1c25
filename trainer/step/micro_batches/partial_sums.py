"""Partial gradient sums of an interrupted step, and the micro-batches they lack. Pure.

Integer sums do not depend on the order of addition, so the sums of the surviving ranks stay valid
under any plan. Only micro-batches that some parameter lacks are recomputed, and a parameter that
includes one already skips it (ReCoVer, 2026, also keeps micro-batch gradients). The unit is the
parameter, not the layer: the ranks of a tensor group may be interrupted at different points of one
backward pass. Of a parameter the unit is a slice of a micro-batch: slice q of micro-batch m has the
number m times the slices of a sequence + q.

The sums of experts have gradients of all ranks of their team, and would be lost for all of it. What
tokens brought to their experts is kept for the step, so these gradients alone are computed again
where the tokens' ranks are left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.parallel.layout import LostGradient, SharePlace
from holdfast.parallel.plan import Plan
from holdfast.parallel.reading import Count, of_kind

ParameterKey = tuple[int, int, int]
"""A parameter: the part that it is of, its layer, and its row in the table of these."""
Included = Mapping[ParameterKey, frozenset[int]]
"""The units in the sums of each parameter, of one rank or of all that have it together.

Sums of rows that parts share have the units of each of these parts."""
Inputs = Mapping[int, tuple[int, ...]]
"""The ranks that have kept what a unit brought to experts, in the order of its tokens."""
RankInputs = Mapping[SharePlace, Collection[int]]
"""The units whose inputs of experts a rank has kept, by its share of their tokens."""
_AsData = list[tuple[Count, Count, list[Count], list[Count]]]


@dataclass(frozen=True, slots=True)
class InterruptedStep:
    """An interrupted step, and the units in the sums of the surviving ranks."""

    step: int
    """The step, counted from 0."""
    included: Included
    slices: int = 1
    """The slices of a sequence."""
    inputs: Mapping[int, Inputs] = field(default_factory=dict)
    """By stage, the units of which a team has kept all inputs of experts."""

    def missing(self, plan: Plan, micro_batches: int) -> frozenset[int]:
        """The micro-batches to compute: some parameter lacks a slice that no inputs give."""
        units = frozenset(range(micro_batches * self.slices))
        done = units
        for layer, spec in enumerate(plan.layers):
            kept = frozenset(self.inputs.get(plan.stage_of_layer(layer), ()))
            for part, rows in enumerate(spec.parameters):
                for row, of_row in enumerate(rows):
                    found = self.included.get((part, layer, row), frozenset())
                    done &= found if of_row.expert is None else found | kept
        return frozenset(unit // self.slices for unit in units - done)

    def lost_gradients(self, plan: Plan, rank: int, repeated: frozenset[int]) -> list[LostGradient]:
        """The gradients of experts that the rank's team computes again from inputs.

        Equal on all ranks of a team. Of an expert with several hosts, units go to these in turn.

        Args:
            repeated: the micro-batches that are computed again whole; those of `missing`.
        """
        place = plan.stage_replicas.find(rank)
        inputs = {} if place is None else self.inputs.get(place.pipeline, {})
        if not inputs:
            return []
        members = {member: index for index, member in enumerate(plan.team_of_rank(rank))}
        here = {
            unit: tuple(members[source] for source in sources)
            for unit, sources in sorted(inputs.items())
            if unit // self.slices not in repeated and members.keys() >= set(sources)
        }
        found: list[LostGradient] = []
        for layer in plan.layers_at(rank):
            hosts, of_layer = plan.hosts(layer), list[LostGradient]()
            for expert, rows in _experts(plan, layer).items():
                within = [members[host] for host in hosts[expert] if host in members]
                added = (self.included.get(row, frozenset()) for row in rows)
                of_layer += [
                    LostGradient(
                        layer,
                        divmod(unit, self.slices),
                        expert,
                        here[unit],
                        within[unit % len(within)],
                    )
                    for unit in here.keys() - frozenset.intersection(*added)
                ]
            found += sorted(of_layer)
        return found

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


def inputs_after_change(
    plan: Plan, following: Plan, inputs: Mapping[int, RankInputs], fresh: frozenset[int]
) -> Mapping[int, Inputs]:
    """By stage, the units of which a team of the next plan has kept all inputs of experts.

    Args:
        inputs: by rank, for the ranks that were in the same step.
        fresh: as for `keeps_sums`.
    """
    shares: dict[tuple[int, tuple[int, ...], int, int], dict[int, int]] = {}
    for rank, of_rank in sorted(inputs.items()):
        if keeps_sums(plan, following, rank, fresh):
            stage = following.stage_replicas.coordinates(rank).pipeline
            team = following.team_of_rank(rank)
            for (place, count), units in of_rank.items():
                for unit in units:
                    found = shares.setdefault((stage, team, count, unit), {})
                    found.setdefault(place, rank)
    whole: dict[int, dict[int, tuple[int, ...]]] = {}
    for (stage, _, count, unit), found in shares.items():
        if len(found) == count:
            sources = tuple(rank for _, rank in sorted(found.items()))
            whole.setdefault(stage, {}).setdefault(unit, sources)
    return whole


def _experts(plan: Plan, layer: int) -> dict[int, list[ParameterKey]]:
    """The rows of each expert of a layer."""
    found: dict[int, list[ParameterKey]] = {}
    for part, rows in enumerate(plan.layers[layer].parameters):
        for row, spec in enumerate(rows):
            if spec.expert is not None:
                found.setdefault(spec.expert, []).append((part, layer, row))
    return found


def inputs_to_data(inputs: RankInputs) -> list[tuple[int, int, list[int]]]:
    """JSON values: which share of how many, and the units."""
    return [(place, count, sorted(units)) for (place, count), units in sorted(inputs.items())]


def inputs_from_data(plain: Any) -> dict[SharePlace, frozenset[int]]:
    """The inverse of `inputs_to_data`.

    Raises:
        ValueError: it is not what that returns.
    """
    return {
        SharePlace(place, count): frozenset(units)
        for place, count, units in of_kind(plain, list[tuple[Count, Count, list[Count]]])
    }


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
