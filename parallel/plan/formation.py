"""The formation of stage replicas from the ranks that are there, after losses and joins.

Whole stage replicas stay. Other ranks form whole ones where there are enough of them, and smaller
ones of what is left: a replica of four ranks that loses one goes on as one of two and one of one,
with smaller tensor and context degrees (`Mesh.by_replica_size`). New ones go to the stages with the
fewest ranks. Pure and equal on every rank. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from holdfast.parallel.errors import TooFewRanks
from holdfast.parallel.layout import Mesh, StageReplica, StageReplicas
from holdfast.parallel.plan.initial import micro_batch_counts
from holdfast.parallel.plan.plan import Plan, Shard, Slowness
from holdfast.parallel.plan.speeds import capacities

_Stages = list[list[StageReplica]]
_CONSIDERED = 64
"""Ranks that are considered for a stage replica, at least."""


@dataclass(frozen=True, slots=True)
class Roster:
    """The ranks that may be in the next plan."""

    ranks: tuple[int, ...]
    node_of: Mapping[int, str]
    fresh: frozenset[int] = field(default=frozenset())
    """The ranks among them that hold no state yet."""
    loads: tuple[tuple[int, ...], ...] = ()
    """By layer, the choices of each expert in the last steps; empty: not known."""
    slowness: Slowness = ()
    """The slow ranks, as of `Plan.slowness`."""
    has_room: Callable[[Plan, int], bool] | None = None
    """Whether a rank's memory suffices for its part in a plan; None: it does. Asked only of ranks
    that get more than a rank of the configured mesh has."""


def replica_sizes(mesh: Mesh, shard: Shard) -> tuple[int, ...]:
    """The numbers of ranks that a stage replica may have, the full one first.

    Where replicas share more than the optimizer's state, there is no smaller one: the memory that
    sharing saves would be needed for it.
    """
    return tuple(mesh.by_replica_size) if shard == "optimizer" else (mesh.shards,)


def next_stage_replicas(plan: Plan, roster: Roster, sizes: Sequence[int]) -> StageReplicas:
    """The stage replicas of the ranks of a roster.

    Args:
        sizes: the sizes that replicas may have, the full one first.
    Raises:
        TooFewRanks: there are too few for a single one.
    """
    old, whole = plan.stage_replicas, sizes[0]
    present = set(roster.ranks)
    kept = [
        [replica for replica in stage if len(replica) == whole and present.issuperset(replica)]
        for stage in old.stages
    ]
    pool = present - {rank for stage in kept for replica in stage for rank in replica}
    formed, spares = _formed(pool, kept, plan, roster, sizes)
    count = sum(map(len, kept)) + len(formed)
    if not count:
        mesh = plan.configured_mesh
        refused = len(sizes) < len(replica_sizes(mesh, plan.shard))
        why = "; a smaller one does not fit into their memory" if refused else ""
        raise TooFewRanks(
            f"{len(present)} ranks are left, but a stage replica takes {sizes[-1]} "
            f"({mesh.by_replica_size[sizes[-1]].stage_replica_text}){why}; bring ranks back"
        )
    pipeline = min(plan.configured_mesh.pipeline, count)
    if pipeline == old.pipeline:
        stages = kept
        _place(formed, stages, plan)
        _level(stages)
    else:
        stages = _divided([*(r for stage in kept for r in stage), *formed], pipeline, plan)
    limit = sum(map(len, plan.micro_batches))
    busy = [_with_work(stage, limit, roster) for stage in stages]
    idle = [r for stage in stages for r in stage if not any(r in held for held in busy)]
    spares += (rank for replica in idle for rank in replica)
    return StageReplicas(tuple(map(tuple, busy)), tuple(sorted(spares)))


def _with_work(stage: list[StageReplica], micro_batches: int, roster: Roster) -> list[StageReplica]:
    """The replicas of a stage that have a micro-batch to compute."""
    counts = micro_batch_counts(micro_batches, capacities(stage, roster.slowness))
    return [replica for replica, own in zip(stage, counts, strict=True) if own]


def _formed(
    pool: set[int], kept: _Stages, plan: Plan, roster: Roster, sizes: Sequence[int]
) -> tuple[list[StageReplica], list[int]]:
    """New stage replicas from ranks without a whole one, and the ranks left over."""
    whole = sizes[0]
    found: list[StageReplica] = []
    left = set(pool)
    for first in sorted(rank for rank in pool if rank % whole == 0):
        configured = tuple(range(first, first + whole))
        if left.issuperset(configured):
            found.append(configured)
            left.difference_update(configured)
    whole_ones = sum(map(len, kept)) + len(found) + len(left) // whole
    if whole_ones < plan.configured_mesh.pipeline:
        # Layers would have to move. The ranks of a stage that is left without a replica keep it.
        for stage, replicas in zip(kept, plan.stage_replicas.stages, strict=True):
            if not stage:
                own = left.intersection(rank for replica in replicas for rank in replica)
                groups, _ = _grouped(own, plan, roster, sizes)
                found += groups
                left.difference_update(rank for group in groups for rank in group)
    groups, spares = _grouped(left, plan, roster, sizes)
    return found + groups, spares


def _grouped(
    ranks: Collection[int], plan: Plan, roster: Roster, sizes: Sequence[int]
) -> tuple[list[StageReplica], list[int]]:
    """Stage replicas of some ranks, the largest first, and the ranks left over.

    Where replicas lie within a node, so do new ones of any size: their ranks have most to say to
    each other.
    """
    left = sorted(ranks, key=lambda rank: (roster.node_of[rank], rank))
    found: list[StageReplica] = []
    if len(sizes) > 1 and not _span_nodes(plan, roster):
        of_node = [list(own) for _, own in groupby(left, key=roster.node_of.__getitem__)]
        for own in of_node:
            found += _decomposed(own, plan, sizes)[0]
        taken = {rank for group in found for rank in group}
        left = [rank for rank in left if rank not in taken]
    groups, spares = _decomposed(left, plan, sizes)
    return sorted(found + groups, key=len, reverse=True), spares


def _span_nodes(plan: Plan, roster: Roster) -> bool:
    """Whether the ranks of a stage replica are on several nodes."""
    node_of = roster.node_of
    return any(
        len({node_of[rank] for rank in replica if rank in node_of}) > 1
        for stage in plan.stage_replicas.stages
        for replica in stage
    )


def _decomposed(
    ranks: Sequence[int], plan: Plan, sizes: Sequence[int]
) -> tuple[list[StageReplica], list[int]]:
    """Stage replicas of ranks in their order, the largest first, and the ranks left over.

    A smaller replica stays as it is where it can.
    """
    places, left = plan.stage_replicas, list(ranks)
    smaller = [held for stage in places.stages for held in stage if len(held) < sizes[0]]
    found: list[StageReplica] = []
    for size in sizes:
        while len(left) >= size:
            same = (held for held in smaller if len(held) == size and set(held).issubset(left))
            if len(sizes) > 1:
                found.append(tuple(_by_parts(next(same, None) or left, size, plan)))
            else:
                found.append(tuple(sorted(left[:size], key=lambda r: (places.shard_index(r), r))))
            left = [rank for rank in left if rank not in found[-1]]
    return found, left


def _by_parts(ranks: Sequence[int], size: int, plan: Plan) -> list[int]:
    """The ranks of a stage replica by shard: for each the one that holds most of its parts now."""
    left = list(ranks[: max(size, _CONSIDERED)])
    held = {
        rank: frozenset(plan.parts_of(rank) if plan.stage_replicas.find(rank) else ())
        for rank in left
    }
    found = []
    for shard in range(size):
        parts = plan.configured_mesh.by_replica_size[size].parts_of(shard)
        found.append(max(left, key=lambda rank: len(held[rank].intersection(parts))))
        left.remove(found[-1])
    return found


def _ranks(stage: list[StageReplica]) -> int:
    return sum(map(len, stage))


def _divided(replicas: list[StageReplica], pipeline: int, plan: Plan) -> _Stages:
    """All stage replicas, over another number of stages."""
    if len(set(map(len, replicas))) == 1:
        edges = [k * len(replicas) // pipeline for k in range(pipeline + 1)]
        return [replicas[a:b] for a, b in pairwise(edges)]
    stages: _Stages = [[] for _ in range(pipeline)]
    _place(replicas, stages, plan)
    return stages


def _place(replicas: list[StageReplica], stages: _Stages, plan: Plan) -> None:
    """Add each stage replica to the stage with the fewest ranks, the largest first.

    Among equals a whole one goes to its configured stage, and a smaller one to the stage that its
    ranks are in.
    """
    mesh = plan.configured_mesh
    for replica in sorted(replicas, key=len, reverse=True):
        home = mesh.coordinates(replica[0]).pipeline if replica[0] < mesh.size else -1
        at = plan.stage_replicas.find(replica[0])
        if at is not None and len(replica) < mesh.shards:
            home = at.pipeline
        ranks = [_ranks(stage) for stage in stages]
        stage = min(range(len(stages)), key=lambda s: (ranks[s], s != home, s))
        stages[stage].append(replica)
        stages[stage].sort()


def _level(stages: _Stages) -> None:
    """Move stage replicas from full stages to others while that makes them more equal."""
    while True:
        ranks = [_ranks(stage) for stage in stages]
        most = max(range(len(stages)), key=lambda s: (ranks[s], s))
        fewest = min(range(len(stages)), key=lambda s: (ranks[s], s))
        movable = [r for r in stages[most] if 2 * len(r) <= ranks[most] - ranks[fewest]]
        if not movable or len(stages[most]) == 1:
            return
        replica = max(enumerate(movable), key=lambda found: (len(found[1]), found[0]))[1]
        stages[most].remove(replica)
        stages[fewest].append(replica)
