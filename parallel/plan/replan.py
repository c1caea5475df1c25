"""The next plan after ranks are lost or join: every stage computed, little moved.

Whole stage replicas stay as they are, and the other ranks form new ones (formation.py), which may
be smaller. The micro-batches of a stage are divided by the ranks of its replicas, so activations
cross pipelines (ReCycle, Gandhi et al. 2024). If stages are then out of balance, layers
move between them (the minimax partition of ElasWave, 2025). Only blocks of lost ranks, and of
layers that moved, get another owner. Pure and equal on every rank. Needs no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import StageReplicas
from holdfast.parallel.plan.expert_hosts import (
    Hosts,
    copies_by_load,
    even_copies,
    evened,
    first_hosts,
    next_hosts,
    of_all_teams,
    overlapping_hosts,
    relabeled,
    unevenness,
)
from holdfast.parallel.plan.formation import Roster, next_stage_replicas, replica_sizes
from holdfast.parallel.plan.initial import (
    dealt,
    entering_order,
    micro_batch_counts,
    split_micro_batches,
)
from holdfast.parallel.plan.ownership import Together, assign_owners, by_block
from holdfast.parallel.plan.plan import MicroBatchAssignment, Plan, Slowness
from holdfast.parallel.plan.shadow_placement import assign_shadows
from holdfast.parallel.plan.speeds import capacities
from holdfast.parallel.schedules import placement

_UNEVEN = 1.1
"""Experts get other copies if the rank of a team with most work has so many times the mean."""
_WORTH = 0.05
"""Layers move if the slowest stage becomes faster by more than this share of its time."""


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
        TooFewRanks: there are too few ranks for a single stage replica.
    """
    sizes = replica_sizes(plan.configured_mesh, plan.shard)
    while True:
        found = _planned(plan, roster, sizes, generation=generation, move_layers=move_layers)
        found = with_shadows(found, roster, redundancy, previous=plan)
        too_small = _without_room(found, roster)
        if not too_small:
            return found
        sizes = tuple(size for size in sizes if size > max(too_small))


def _without_room(plan: Plan, roster: Roster) -> set[int]:
    """The sizes of smaller stage replicas that have a rank whose memory does not suffice."""
    has_room, whole = roster.has_room, plan.configured_mesh.shards
    if has_room is None:
        return set()
    return {
        len(replica)
        for stage in plan.stage_replicas.stages
        for replica in stage
        if len(replica) < whole and not all(has_room(plan, rank) for rank in replica)
    }


def _planned(
    plan: Plan, roster: Roster, sizes: tuple[int, ...], *, generation: int, move_layers: bool
) -> Plan:
    """The plan without shadows, with stage replicas of some sizes."""
    stage_replicas = next_stage_replicas(plan, roster, sizes)
    if stage_replicas.pipeline == plan.stage_replicas.pipeline:
        placed, chunk_layers = plan.placement, plan.chunk_layers
        if move_layers:
            chunk_layers = _moved_layers(plan, stage_replicas)
    else:
        placed = placement(plan.schedule, stage_replicas.pipeline, plan.virtual)
        chunk_layers = _even_chunks(plan, placed, stage_replicas)
    # Ranks that share experts compute at the same time, so one with fewer would not help.
    slowness = () if plan.spreads_experts else roster.slowness
    by_replica, assignment = divide_micro_batches(
        stage_replicas,
        sum(map(len, plan.micro_batches)),
        plan.micro_batch_order,
        together=plan.spreads_experts,
        slowness=slowness,
    )
    changed = plan.evolved(
        slowness=slowness,
        generation=generation,
        stage_replicas=stage_replicas,
        placement=placed,
        chunk_layers=chunk_layers,
        micro_batches=by_replica,
        assignment=assignment,
        given_hosts=None,
        given_owners=None,
        shadows=(),
        incoming=(),
    )
    if plan.spreads_experts:
        hosts = _hosts(plan, changed, roster.loads, levels=move_layers)
        changed = changed.evolved(given_hosts=hosts, coming_hosts=None)
    return changed.evolved(given_owners=_owners(plan, changed, roster))


def _hosts(
    before: Plan, after: Plan, loads: Sequence[Sequence[int]], *, levels: bool
) -> tuple[Hosts, ...]:
    """The placement of experts: they stay where they are, as far as they can.

    Args:
        loads: as of `Roster`.
        levels: whether experts may leave a rank that stays.
    """
    known: dict[tuple[int, Hosts, tuple[int, ...]], Hosts] = {}
    found = []
    coming = before.coming_hosts if levels else None
    for layer in range(len(after.layers)):
        stage = after.stage_of_layer(layer)
        hosts = before.hosts(layer) if coming is None else coming[layer]
        of_layer = tuple(loads[layer][: len(hosts)]) if loads and coming is None else ()
        key = stage, hosts, of_layer
        if key not in known:
            known[key] = of_all_teams(
                [
                    _hosts_of_team(after, hosts, team, of_layer)
                    if levels and hosts
                    else next_hosts(hosts, team, levels=False)
                    for team in after.team_ranks(stage)
                ]
            )
        found.append(known[key])
    return tuple(found)


def _hosts_of_team(plan: Plan, before: Hosts, team: Sequence[int], loads: tuple[int, ...]) -> Hosts:
    """The placement in a team between steps, where experts may move.

    Args:
        loads: of each expert of the layer; empty: not known, or a placement for them is coming.
    """
    if plan.expert_slots and sum(loads):
        here = next_hosts(before, team, levels=False)
        if unevenness(here, [team], loads) <= _UNEVEN:
            return here
        slots = max(plan.expert_slots, -(-len(before) // len(team)))
        copies = copies_by_load(loads, len(team), slots)
        hosts = evened(overlapping_hosts(copies, team, slots, loads), team, slots, loads)
        return relabeled(hosts, before, team)
    if plan.expert_copies > 1 and not plan.expert_slots:
        sizes = plan.expert_ranks, plan.expert_copies
        members, wanted = set(team), even_copies(team, *sizes)
        if any(len(members.intersection(ranks)) != wanted for ranks in before):
            return relabeled(first_hosts(team, len(before), *sizes), before, team)
    return next_hosts(before, team, levels=not plan.expert_slots)


def would_move_experts(plan: Plan, loads: Sequence[Sequence[int]]) -> bool:
    """Whether other copies of experts are worth it. Pure.

    Args:
        loads: as of `Roster`.
    """
    if not (plan.expert_slots and loads and plan.spreads_experts) or plan.incoming:
        return False
    worst = _most_uneven(plan, [plan.hosts(layer) for layer in range(len(plan.layers))], loads)
    if worst <= _UNEVEN:  # asked after every step: another placement takes longer to find
        return False
    better = _most_uneven(plan, _hosts(plan, plan, loads, levels=True), loads)
    return better < (1 - _WORTH) * worst


def _most_uneven(plan: Plan, of_layers: Sequence[Hosts], loads: Sequence[Sequence[int]]) -> float:
    """The unevenness of the layer with most, with a placement of a plan's experts."""
    return max(
        (
            unevenness(
                hosts, plan.team_ranks(plan.stage_of_layer(layer)), loads[layer][: len(hosts)]
            )
            for layer, hosts in enumerate(of_layers)
            if hosts
        ),
        default=1.0,
    )


def relieved(plan: Plan, slowness: Slowness) -> Plan:
    """The same ranks' plan with micro-batches divided by other speeds. Pure."""
    ranks = plan.stage_replicas.ranks
    nodes = dict.fromkeys(ranks, "")
    roster = Roster(ranks, nodes, slowness=slowness)
    return replan(plan, roster, generation=plan.generation, move_layers=False)


def would_move_layers(plan: Plan) -> bool:
    """Whether moving layers between stages is worth it, with the ranks as they are."""
    return _moved_layers(plan, plan.stage_replicas) != plan.chunk_layers


def with_shadows(
    plan: Plan, roster: Roster, redundancy: int, *, previous: Plan | None = None
) -> Plan:
    """The plan with shadows for all its blocks; shadows of a previous plan stay if they can."""
    if not redundancy:
        return plan
    before = previous.shadows if previous is not None else ()
    with_state = frozenset(plan.stage_replicas.ranks) - roster.fresh
    load: dict[int, int] = {}
    found: list[tuple[Together, tuple[int, ...]]] = []
    for group in plan.given_together:
        firsts = [keys[0] for keys in group]
        chosen = assign_shadows(
            [sum(plan.block(key).work for key in keys) for keys in group],
            [plan.owner(key) for key in firsts],
            plan.stage_replicas,
            roster.node_of,
            redundancy,
            load=load,
            previous=[before[part][place] for part, place in firsts] if before else None,
            with_state=with_state,
        )
        found += zip(group, chosen, strict=True)
    return plan.evolved(shadows=by_block(plan.blocks, found))


def divide_micro_batches(
    stage_replicas: StageReplicas,
    count: int,
    order: str,
    *,
    together: bool = False,
    slowness: Slowness = (),
) -> tuple[tuple[tuple[int, ...], ...], MicroBatchAssignment | None]:
    """The micro-batches of the replicas of the widest stage, and those of every stage. Pure.

    The second is None if all stages have replicas of the same sizes and speeds.

    Args:
        count: the micro-batches of a step.
        order: a name in `MICRO_BATCH_ORDERS`.
        together: whether replicas of a stage compute at the same time, so that of any consecutive
            micro-batches each has about its share.
        slowness: of slow ranks, which get fewer.
    """
    sizes = [capacities(stage, slowness) for stage in stage_replicas.stages]
    widest = max(sizes, key=len)
    rows = split_micro_batches(count, widest, order)
    if all(found == widest for found in sizes):
        return rows, None
    if together:
        entering = entering_order(rows, widest)
        return rows, tuple(
            tuple(tuple(entering[place] for place in places) for places in dealt(counts))
            for counts in (micro_batch_counts(count, found) for found in sizes)
        )
    return rows, tuple(_assign_in_stage(found, rows) for found in sizes)


def _assign_in_stage(
    sizes: Sequence[int], rows: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """The micro-batches of each replica: of its own row as many as it can do in time, and a part of
    those of other rows. What a row gives away is spread over it, so that no replica waits long."""
    counts = micro_batch_counts(sum(map(len, rows)), sizes)
    assigned: list[list[int]] = [[] for _ in counts]
    rest: list[tuple[int, int]] = []
    for replica, row in enumerate(rows):
        given = len(row) - min(len(row), counts[replica] if replica < len(counts) else 0)
        for place, number in enumerate(row):
            if (place + 1) * given // len(row) > place * given // len(row):
                rest.append((place, number))
            else:
                assigned[replica].append(number)
    rest.sort()
    heap = [
        ((len(numbers) + 1) / size, replica)
        for replica, (numbers, size) in enumerate(zip(assigned, sizes, strict=True))
        if len(numbers) < counts[replica]
    ]
    heapq.heapify(heap)
    for _, number in rest:
        _, replica = heapq.heappop(heap)
        assigned[replica].append(number)
        if len(assigned[replica]) < counts[replica]:
            heapq.heappush(heap, ((len(assigned[replica]) + 1) / sizes[replica], replica))
    return tuple(map(tuple, assigned))


def _stage_weights(plan: Plan) -> list[float]:
    return [float(layer.forward_flops) for layer in plan.layers]


def _moved_layers(plan: Plan, stage_replicas: StageReplicas) -> tuple[tuple[int, int], ...]:
    """The layers of each stage: unchanged, or balanced if that is worth moving them."""
    weights = _stage_weights(plan)
    capacity = _capacity(plan, stage_replicas, plan.placement)
    if min(capacity) == max(capacity) and _is_configured(plan, stage_replicas):
        return plan.configured_layers
    best = minimax_partition(weights, capacity)
    current = _slowest(weights, plan.chunk_layers, capacity)
    if _slowest(weights, best, capacity) < (1 - _WORTH) * current:
        return best
    return plan.chunk_layers


def _capacity(plan: Plan, stage_replicas: StageReplicas, placed: Sequence[int]) -> list[float]:
    """The ranks of each chunk's stage, counted in whole stage replicas."""
    return [sum(stage_replicas.sizes(at)) / plan.configured_mesh.shards for at in placed]


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
    capacity = _capacity(plan, stage_replicas, placed)
    return minimax_partition(_stage_weights(plan), capacity)


def _slowest(
    weights: Sequence[float], parts: Sequence[tuple[int, int]], capacity: Sequence[float]
) -> float:
    return max(sum(weights[a:b]) / ranks for (a, b), ranks in zip(parts, capacity, strict=True))


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
    shares = _shares(after)
    found: list[tuple[Together, int]] = []
    for number, group in enumerate(after.given_together):
        changing = [keys for keys in group if stages[after.block(keys[0]).layer] in touched]
        owners = {keys: before.owner(keys[0]) for keys in group}
        chosen = assign_owners(
            [sum(after.block(key).work for key in keys) for keys in changing],
            [after.candidates(keys) for keys in changing],
            [owners[keys] if owners[keys] in staying else None for keys in changing],
            share_of=shares.__getitem__ if shares and number else None,
        )
        owners.update(zip(changing, chosen, strict=True))
        found += owners.items()
    return by_block(after.blocks, found)


def _shares(plan: Plan) -> dict[int, float]:
    """The share of a part that each rank owns, relative to others: less of each, with more parts.

    Empty if all ranks have equally many.
    """
    placed = [rank for stage in plan.stage_replicas.stages for held in stage for rank in held]
    counts = {rank: len(plan.parts_of(rank)) for rank in placed}
    if len(set(counts.values())) == 1:
        return {}
    return {rank: 1 / count for rank, count in counts.items()}


def _touched_stages(before: Plan, after: Plan, roster: Roster) -> set[int]:
    """The stages with changed replicas, layers or hosts, or with a rank without state."""
    pipeline = after.stage_replicas.pipeline
    if (before.placement, before.chunk_layers) != (after.placement, after.chunk_layers):
        return set(range(pipeline))
    return {
        stage
        for stage in range(pipeline)
        if before.spreads_experts
        or before.stage_replicas.stages[stage] != after.stage_replicas.stages[stage]
        or any(
            not roster.fresh.isdisjoint(replica) for replica in after.stage_replicas.stages[stage]
        )
    }
