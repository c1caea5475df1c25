"""Plans as JSON values, for joining ranks and for programs beside the run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from holdfast.parallel.errors import LayoutError
from holdfast.parallel.layout import StageReplicas
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
    owners: tuple[list[tuple[_Rank, Count]], ...]
    shadows: tuple[list[tuple[_Ranks, Count]], ...]
    arriving: tuple[list[tuple[_Ranks, Count]], ...]

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


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """The values by which a plan differs from the first plan of its configuration."""
    return {
        "generation": plan.generation,
        "stages": plan.stage_replicas.stages,
        "spares": plan.stage_replicas.spares,
        "placement": plan.placement,
        "chunk_layers": plan.chunk_layers,
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
        stage_replicas, sum(map(len, first.micro_batches)), first.micro_batch_order
    )
    return first.evolved(
        generation=data.generation,
        stage_replicas=stage_replicas,
        placement=data.placement,
        chunk_layers=data.chunk_layers,
        micro_batches=rows,
        assignment=assignment,
        given_owners=_by_block(data.owners, blocks),
        shadows=_by_block(data.shadows, blocks) if data.shadows else (),
        incoming=_by_block(data.arriving, blocks) if data.arriving else (),
    )


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
