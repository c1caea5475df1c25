"""The next plan after ranks are lost or join: every stage computed, little moved.

Whole stage replicas stay as they are. The other ranks form new ones, which go to the stages with
the fewest. The micro-batches of a lost stage replica go to the other replicas of its stage, so
activations cross pipelines (ReCycle, Gandhi et al. 2024). If stages are then out of balance, layers
move between them (the minimax partition of ElasWave, 2025). Only blocks of lost ranks, and of
layers that moved, get another owner. Pure and equal on every rank. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import inf

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import StageReplica, StageReplicas
from holdfast.parallel.plan.initial import split_micro_batches
from holdfast.parallel.plan.ownership import assign_owners
from holdfast.parallel.plan.plan import MicroBatchAssignment, Plan
from holdfast.parallel.plan.shadow_placement import assign_shadows
from holdfast.parallel.schedules import placement

_WORTH = 0.05
"""Layers move if the slowest stage becomes faster by more than this share of its time."""


@dataclass(frozen=True, slots=True)
class Roster:
    """The ranks that may be in the next plan."""

    ranks: tuple[int, ...]
    node_of: Mapping[int, str]
    fresh: frozenset[int] = field(default=frozenset())
    """The ranks among them that hold no state yet."""


def replan(
    plan: Plan,
    roster: Roster,
    *,
    generation: int,
    redundancy: int = 0,
    move_layers: bool = True,
) -> Plan:
    """The plan of the next generation, in which every rank has its final coordinates.

    Args:
        redundancy: the number of shadows per block.
        move_layers: whether layers may move between stages that all still have holders.
    Raises:
        ConfigError: there are too few ranks for a single stage replica.
    """
    stage_replicas = _stage_replicas(plan, roster)
    if stage_replicas.pipeline == plan.stage_replicas.pipeline:
        placed, chunk_layers = plan.placement, plan.chunk_layers
        if move_layers and plan.virtual == 1:
            chunk_layers = _moved_layers(plan, stage_replicas)
    else:
        placed = placement(plan.schedule, stage_replicas.pipeline, plan.virtual)
        chunk_layers = _even_chunks(plan, placed, stage_replicas)
    by_replica = split_micro_batches(
        sum(map(len, plan.micro_batches)), stage_replicas.widest, plan.micro_batch_order
    )
    changed = plan.evolved(
        generation=generation,
        stage_replicas=stage_replicas,
        placement=placed,
        chunk_layers=chunk_layers,
        micro_batches=by_replica,
        assignment=assign_micro_batches(stage_replicas, by_replica),
        given_owners=None,
        shadows=(),
        incoming=(),
    )
    owners = _owners(plan, changed, roster)
    changed = changed.evolved(given_owners=owners)
    return with_shadows(changed, roster, redundancy, previous=plan)


def would_move_layers(plan: Plan) -> bool:
    """Whether moving layers between stages is worth it, with the ranks as they are."""
    return plan.virtual == 1 and _moved_layers(plan, plan.stage_replicas) != plan.chunk_layers


def with_shadows(
    plan: Plan, roster: Roster, redundancy: int, *, previous: Plan | None = None
) -> Plan:
    """The plan with shadows for all its blocks; shadows of a previous plan stay if they can."""
    if not redundancy:
        return plan
    before = previous.shadows if previous is not None else ()
    with_state = frozenset(plan.stage_replicas.ranks) - roster.fresh
    load: dict[int, int] = {}
    found = tuple(
        assign_shadows(
            [block.elements for block in blocks],
            plan.owners[index],
            plan.stage_replicas,
            roster.node_of,
            redundancy,
            load=load,
            previous=before[index] if before else None,
            with_state=with_state,
        )
        for index, blocks in enumerate(plan.blocks)
    )
    return plan.evolved(shadows=found)


def _stage_replicas(plan: Plan, roster: Roster) -> StageReplicas:
    """The next stage replicas: whole ones stay, new ones go to the stages with the fewest."""
    old, size = plan.stage_replicas, plan.stage_replicas.shards
    present = set(roster.ranks)
    kept = [[replica for replica in stage if present.issuperset(replica)] for stage in old.stages]
    pool = present - {rank for stage in kept for replica in stage for rank in replica}
    formed, spares = _formed(pool, size, plan, roster)
    count = sum(map(len, kept)) + len(formed)
    if not count:
        raise ConfigError(
            f"{len(present)} ranks are left, but a stage replica takes {size} "
            f"({plan.configured_mesh.stage_replica_text}); bring ranks back"
        )
    pipeline = min(plan.configured_mesh.pipeline, count)
    if pipeline != old.pipeline:
        ordered = [replica for stage in kept for replica in stage] + formed
        edges = [k * count // pipeline for k in range(pipeline + 1)]
        kept = [ordered[a:b] for a, b in pairwise(edges)]
    else:
        for replica in formed:
            _place(replica, kept, plan)
        _level(kept)
    limit = sum(map(len, plan.micro_batches))
    idle = [rank for stage in kept for replica in stage[limit:] for rank in replica]
    stages = tuple(tuple(stage[:limit]) for stage in kept)
    return StageReplicas(stages, tuple(sorted((*spares, *idle))))


def _formed(
    pool: set[int], size: int, plan: Plan, roster: Roster
) -> tuple[list[StageReplica], list[int]]:
    """New stage replicas from ranks without one, and the ranks left over."""
    stage_replicas: list[StageReplica] = []
    left = set(pool)
    for first in sorted(rank for rank in pool if rank % size == 0):
        configured = tuple(range(first, first + size))
        if left.issuperset(configured):
            stage_replicas.append(configured)
            left.difference_update(configured)
    rest = sorted(left, key=lambda rank: (roster.node_of[rank], rank))
    whole = len(rest) - len(rest) % size
    for start in range(0, whole, size):
        group = rest[start : start + size]
        stage_replicas.append(
            tuple(sorted(group, key=lambda r: (plan.stage_replicas.shard_index(r), r)))
        )
    return stage_replicas, rest[whole:]


def _place(replica: StageReplica, stages: list[list[StageReplica]], plan: Plan) -> None:
    """Add a stage replica to the stage with the fewest; among equals, to its configured stage."""
    configured = (
        plan.configured_mesh.coordinates(replica[0]).pipeline
        if replica[0] < plan.configured_mesh.size
        else -1
    )
    stage = min(range(len(stages)), key=lambda s: (len(stages[s]), s != configured, s))
    stages[stage].append(replica)
    stages[stage].sort()


def _level(stages: list[list[StageReplica]]) -> None:
    """Move stage replicas from full stages to others until their numbers differ by one at most."""
    while True:
        most = max(range(len(stages)), key=lambda s: (len(stages[s]), s))
        fewest = min(range(len(stages)), key=lambda s: (len(stages[s]), s))
        if len(stages[most]) - len(stages[fewest]) < 2:
            return
        stages[fewest].append(stages[most].pop())


def assign_micro_batches(
    stage_replicas: StageReplicas, by_replica: Sequence[tuple[int, ...]]
) -> MicroBatchAssignment | None:
    """The micro-batches of each stage replica; None if every stage has all its replicas."""
    if all(
        stage_replicas.replicas(stage) == len(by_replica)
        for stage in range(stage_replicas.pipeline)
    ):
        return None
    return tuple(
        _assign_in_stage(stage_replicas.replicas(s), by_replica)
        for s in range(stage_replicas.pipeline)
    )


def _assign_in_stage(
    replicas: int, by_replica: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """The micro-batches of each replica: its own, and an even part of those of missing replicas."""
    assigned = [list(row) for row in by_replica[:replicas]]
    rest = sorted(
        (place, number) for row in by_replica[replicas:] for place, number in enumerate(row)
    )
    for _, number in rest:
        min(assigned, key=len).append(number)
    return tuple(map(tuple, assigned))


def _stage_weights(plan: Plan) -> list[float]:
    return [float(layer.forward_flops) for layer in plan.layers]


def _moved_layers(plan: Plan, stage_replicas: StageReplicas) -> tuple[tuple[int, int], ...]:
    """The layers of each stage: unchanged, or balanced if that is worth moving them."""
    weights = _stage_weights(plan)
    capacity = [stage_replicas.replicas(stage) for stage in plan.placement]
    if min(capacity) == max(capacity) and _is_configured(plan, stage_replicas):
        return plan.configured_layers
    best = minimax_partition(weights, capacity)
    current = _slowest(weights, plan.chunk_layers, capacity)
    if _slowest(weights, best, capacity) < (1 - _WORTH) * current:
        return best
    return plan.chunk_layers


def _is_configured(plan: Plan, stage_replicas: StageReplicas) -> bool:
    return stage_replicas.pipeline == plan.configured_mesh.pipeline


def _even_chunks(
    plan: Plan, placed: Sequence[int], stage_replicas: StageReplicas
) -> tuple[tuple[int, int], ...]:
    """The layers of each chunk after a change of the number of stages."""
    if stage_replicas.pipeline == plan.configured_mesh.pipeline:
        return plan.configured_layers
    if len(placed) == 1:
        return ((0, len(plan.layers)),)
    capacity = [stage_replicas.replicas(stage) for stage in placed]
    return minimax_partition(_stage_weights(plan), capacity)


def _slowest(
    weights: Sequence[float], parts: Sequence[tuple[int, int]], capacity: Sequence[int]
) -> float:
    return max(
        sum(weights[a:b]) / replicas for (a, b), replicas in zip(parts, capacity, strict=True)
    )


def minimax_partition(
    weights: Sequence[float], capacity: Sequence[float]
) -> tuple[tuple[int, int], ...]:
    """Contiguous parts, one per capacity, with the least largest weight / capacity.

    Each part has one item at least. Dynamic programming over prefix sums: items squared times
    parts.
    """
    count, parts = len(weights), len(capacity)
    if parts > count:
        raise ConfigError(f"{count} layers cannot be split over {parts} chunks; use fewer stages")
    sums = list(accumulate(weights, initial=0.0))
    best = [0.0] + [inf] * count
    cuts: list[list[int]] = []
    for part in range(parts):
        row, cut = [inf] * (count + 1), [0] * (count + 1)
        for stop in range(part + 1, count - (parts - part - 1) + 1):
            for start in range(stop - 1, part - 1, -1):
                own = (sums[stop] - sums[start]) / capacity[part]
                if own >= row[stop]:
                    break
                slowest = max(best[start], own)
                if slowest < row[stop]:
                    row[stop], cut[stop] = slowest, start
        best = row
        cuts.append(cut)
    edges = [count]
    for cut in reversed(cuts):
        edges.append(cut[edges[-1]])
    return tuple(pairwise(reversed(edges)))


def _owners(before: Plan, after: Plan, roster: Roster) -> tuple[tuple[int, ...], ...]:
    """The owners of blocks: a block changes its owner only if that is lost or lacks the layer."""
    staying = set(after.stage_replicas.ranks) - roster.fresh
    touched = _touched_stages(before, after, roster)
    stages = [after.placement[after.chunk_of_layer(k)] for k in range(len(after.layers))]
    found = []
    for index, blocks in enumerate(after.blocks):
        owners = list(before.owners[index])
        places = [place for place, b in enumerate(blocks) if stages[b.layer] in touched]
        chosen = assign_owners(
            [blocks[place].elements for place in places],
            [after.contributors(blocks[place]) for place in places],
            [owners[place] if owners[place] in staying else None for place in places],
        )
        for place, owner in zip(places, chosen, strict=True):
            owners[place] = owner
        found.append(tuple(owners))
    return tuple(found)


def _touched_stages(before: Plan, after: Plan, roster: Roster) -> set[int]:
    """The stages with changed replicas or layers, or with a rank without state."""
    pipeline = after.stage_replicas.pipeline
    if (before.placement, before.chunk_layers) != (after.placement, after.chunk_layers):
        return set(range(pipeline))
    return {
        stage
        for stage in range(pipeline)
        if before.stage_replicas.stages[stage] != after.stage_replicas.stages[stage]
        or any(
            not roster.fresh.isdisjoint(replica) for replica in after.stage_replicas.stages[stage]
        )
    }
