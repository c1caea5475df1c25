"""Plans as JSON values, for joining ranks and for programs beside the run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from holdfast.parallel.errors import LayoutError
from holdfast.parallel.layout import StageReplicas
from holdfast.parallel.plan.expert_hosts import Hosts, stage_teams
from holdfast.parallel.plan.formation import replica_sizes
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.replan import divide_micro_batches
from holdfast.parallel.reading import Count, of_kind

_T = TypeVar("_T")
_Rank = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Ranks = tuple[_Rank, ...]


class _PlanData(msgspec.Struct, frozen=True):
    """The values of `plan_to_data`."""

    generation: Count
    stages: tuple[tuple[_Ranks, ...], ...]
    spares: _Ranks
    placement: tuple[Count, ...]
    chunk_layers: tuple[tuple[Count, Count], ...]
    placements: tuple[tuple[_Ranks, ...], ...]
    """The different placements of experts."""
    hosts: tuple[Count, ...]
    """By layer, the number of its placement; empty: all have the first ones."""
    coming_hosts: tuple[Count, ...]
    """By layer, the number of the placement that is coming; empty: none is."""
    owners: tuple[list[tuple[_Rank, Count]], ...]
    shadows: tuple[list[tuple[_Ranks, Count]], ...]
    arriving: tuple[list[tuple[_Ranks, Count]], ...]
    slowness: tuple[tuple[_Rank, Annotated[int, Meta(ge=1, le=1 << 20)]], ...] = ()

    def check(self, first: Plan) -> None:
        """Check that a plan of the same model and batch can have these values.

        Raises:
            ValueError: it cannot.
        """
        sizes = replica_sizes(first.configured_mesh, first.shard)
        ranks = [rank for stage in self.stages for held in stage for rank in held]
        ranks += self.spares
        if not self.stages or not all(self.stages) or len(set(ranks)) != len(ranks):
            raise ValueError("a stage has no ranks, or a rank has two places")
        wrong = {len(held) for stage in self.stages for held in stage}.difference(sizes)
        if wrong:
            allowed = " or ".join(map(str, sizes))
            raise ValueError(f"a replica of a stage has {min(wrong)} ranks, not {allowed}")
        if not self.chunk_layers or len(self.placement) != len(self.chunk_layers):
            raise ValueError("chunks and their places do not fit together")
        if max(self.placement) >= len(self.stages):
            raise ValueError("a chunk is placed at a stage that does not exist")
        ends = (0, *(end for _, end in self.chunk_layers))
        if ends[-1] != len(first.layers) or any(
            not ends[number] == begin <= end
            for number, (begin, end) in enumerate(self.chunk_layers)
        ):
            raise ValueError("the chunks do not have every layer once")
        holding = {rank for runs in self.owners for rank, _ in runs}
        for runs in (*self.shadows, *self.arriving):
            holding.update(rank for following, _ in runs for rank in following)
        if not holding <= set(ranks):
            raise ValueError("a rank without a place holds state")
        for hosts in (self.hosts, self.coming_hosts):
            self._check_experts(first, hosts, set(ranks))
        if self.hosts:
            self._check_teams(first)

    def _check_experts(self, first: Plan, of_layers: tuple[int, ...], ranks: set[int]) -> None:
        if of_layers and not (first.spreads_experts and len(of_layers) == len(first.layers)):
            raise ValueError("experts are placed that have no place of their own")
        if max(of_layers, default=-1) >= len(self.placements):
            raise ValueError("a layer's experts have no place")
        for layer, number in enumerate(of_layers):
            hosts = self.placements[number]
            if len(hosts) != len(first.hosts(layer)):
                raise ValueError("a layer has another number of experts")
            if not all(hosts) or not ranks.issuperset(rank for own in hosts for rank in own):
                raise ValueError("an expert has no rank, or one without a place")

    def _check_teams(self, first: Plan) -> None:
        edges = enumerate(self.chunk_layers)
        stages = [self.placement[chunk] for chunk, (a, b) in edges for _ in range(a, b)]
        for number, stage in zip(self.hosts, stages, strict=True):
            hosts, replicas = self.placements[number], self.stages[stage]
            for team in stage_teams(tuple(map(len, replicas)), first.expert_ranks):
                members = {rank for replica in team for rank in replicas[replica]}
                if any(members.isdisjoint(ranks) for ranks in hosts):
                    raise ValueError("an expert has no rank in a team")
            if not {rank for ranks in hosts for rank in ranks} <= {
                rank for replica in replicas for rank in replica
            }:
                raise ValueError("an expert is on a rank of another stage")


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """The values by which a plan differs from the first plan of its configuration."""
    placements = list(dict.fromkeys((*(plan.given_hosts or ()), *(plan.coming_hosts or ()))))
    return {
        "generation": plan.generation,
        "stages": plan.stage_replicas.stages,
        "spares": plan.stage_replicas.spares,
        "placement": plan.placement,
        "chunk_layers": plan.chunk_layers,
        "slowness": plan.slowness,
        "placements": placements,
        "hosts": [placements.index(found) for found in plan.given_hosts or ()],
        "coming_hosts": [placements.index(found) for found in plan.coming_hosts or ()],
        "owners": [_runs(owners) for owners in plan.owners],
        "shadows": [_runs(shadows) for shadows in plan.shadows],
        "arriving": [_runs(ranks) for ranks in plan.incoming],
    }


def plan_from_data(first: Plan, data: Any) -> Plan:
    """The plan of values that `plan_to_data` made.

    Args:
        first: the first plan of the same configuration.
    Raises:
        LayoutError: the values are of no plan of this configuration.
    """
    try:
        values = of_kind(data, _PlanData)
        values.check(first)
        return _plan_of(first, values)
    except ValueError as error:
        raise LayoutError(f"a plan is none of this configuration: {error}") from error


def _plan_of(first: Plan, data: _PlanData) -> Plan:
    stage_replicas = StageReplicas(data.stages, data.spares)
    blocks = [len(of_shard) for of_shard in first.blocks]
    rows, assignment = divide_micro_batches(
        stage_replicas,
        sum(map(len, first.micro_batches)),
        first.micro_batch_order,
        together=first.spreads_experts,
        slowness=data.slowness,
    )
    return first.evolved(
        generation=data.generation,
        stage_replicas=stage_replicas,
        placement=data.placement,
        chunk_layers=data.chunk_layers,
        slowness=data.slowness,
        micro_batches=rows,
        assignment=assignment,
        given_hosts=_of_layers(data.placements, data.hosts),
        coming_hosts=_of_layers(data.placements, data.coming_hosts),
        given_owners=_by_block(data.owners, blocks),
        shadows=_by_block(data.shadows, blocks) if data.shadows else (),
        incoming=_by_block(data.arriving, blocks) if data.arriving else (),
    )


def _of_layers(placements: Sequence[Hosts], numbers: Sequence[int]) -> tuple[Hosts, ...] | None:
    return tuple(placements[number] for number in numbers) or None


def _by_block(
    shards: Sequence[Sequence[tuple[_T, int]]], blocks: Sequence[int]
) -> tuple[tuple[_T, ...], ...]:
    """A value for each block of each shard.

    Raises:
        ValueError: there are not as many values as blocks.
    """
    if [sum(count for _, count in runs) for runs in shards] != blocks:
        raise ValueError("it has more or fewer values than the model has blocks")
    return tuple(tuple(v for v, count in runs for _ in range(count)) for runs in shards)


def _runs(values: Sequence[Any]) -> list[list[Any]]:
    return [[value, len(list(same))] for value, same in groupby(values)]
