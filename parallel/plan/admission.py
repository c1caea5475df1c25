"""Admission of new ranks: they get state in the background, and own blocks once it is complete.

A change of plan then has two parts. In the first, the work of all ranks stays as it is. Ranks that
will need blocks that they do not hold, newcomers above all, are listed in `Plan.incoming`: they
follow the updates of these blocks, and get their state while training goes on. The second part
activates the intended plan; by then no optimizer state has to move (the asynchronous migration of
ElasWave, 2025, with shadows in place of replayed updates). Pure and equal on every rank. Needs no
torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Set
from dataclasses import replace

from holdfast.parallel.errors import TooFewRanks
from holdfast.parallel.layout import StageReplicas
from holdfast.parallel.plan.block_transfers import held_blocks, incoming_blocks
from holdfast.parallel.plan.formation import Roster, replica_sizes
from holdfast.parallel.plan.ownership import BlockKey
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.replan import replan
from holdfast.parallel.plan.shadow_placement import Shadows


def next_plan(
    plan: Plan,
    roster: Roster,
    *,
    filled: bool,
    generation: int,
    redundancy: int = 0,
    move_layers: bool = True,
) -> Plan:
    """The plan of the next generation: the final one, or one that first prepares some ranks.

    All ranks get their coordinates at once if a stage has no other rank left.

    Args:
        roster: the ranks that may be in the plan; its `fresh` ranks have no state yet.
        filled: whether all blocks that are incoming under `plan` have arrived.
        redundancy, move_layers: as for `replan`.
    Raises:
        TooFewRanks: there are too few ranks for a single stage replica.
    """
    lasting = plan.evolved(incoming=())
    present = frozenset(roster.ranks)
    waiting = present & (roster.fresh if filled else roster.fresh | _empty(plan))
    ready = present - waiting
    prepared = replace(roster, ranks=tuple(sorted(ready)), fresh=frozenset())
    if not _stands(lasting, prepared):
        return replan(
            lasting,
            replace(roster, fresh=waiting),
            generation=generation,
            redundancy=redundancy,
            move_layers=move_layers,
        )
    everybody_stays = present - roster.fresh == frozenset(plan.stage_replicas.ranks)
    if everybody_stays and not (plan.incoming and filled and waiting):
        now = lasting.evolved(generation=generation, given_owners=plan.owners)
    else:
        now = replan(
            lasting,
            prepared,
            generation=generation,
            redundancy=redundancy,
            move_layers=False,
        )
        if not waiting and not move_layers:
            return now
    now = _with_spares(now, waiting)
    coming: dict[int, set[BlockKey]] = {}
    following: Plan | None = None
    for may_move in (move_layers, True):  # what is only made ready comes into force between steps
        following = replan(
            now,
            replace(roster, fresh=frozenset()),
            generation=generation,
            redundancy=redundancy,
            move_layers=may_move,
        )
        coming = _coming(now, following)
        if may_move == move_layers and ready.issuperset(coming) and _have(plan, coming, filled):
            return following
    hosts = following.given_hosts if following is not None else None
    return now.evolved(incoming=_by_block(now, coming), coming_hosts=hosts)


def state_of(plan: Plan, ranks: Collection[int], *, filled: bool) -> dict[int, set[BlockKey]]:
    """The blocks whose state ranks have, incoming ones included if `filled`. Pure."""
    held = held_blocks(plan, ranks)
    if filled:
        for rank, keys in incoming_blocks(plan, ranks).items():
            held[rank] |= keys
    return held


def _empty(plan: Plan) -> frozenset[int]:
    """The ranks that have only incoming blocks."""
    coming = incoming_blocks(plan, plan.stage_replicas.ranks)
    held = held_blocks(plan, plan.stage_replicas.ranks)
    return frozenset(rank for rank, keys in coming.items() if keys and not held[rank])


def _stands(plan: Plan, roster: Roster) -> bool:
    """Whether each stage keeps a stage replica, or its ranks can form a smaller one."""
    ready = frozenset(roster.ranks)
    stages = plan.stage_replicas.stages
    if all(any(ready.issuperset(replica) for replica in stage) for stage in stages):
        return True
    if len(replica_sizes(plan.configured_mesh, plan.shard)) == 1:
        return False
    try:
        formed = replan(plan, roster, generation=plan.generation, move_layers=False)
    except TooFewRanks:
        return False
    return formed.stage_replicas.pipeline == len(stages) and all(
        any(not ready.isdisjoint(replica) for replica in stage) for stage in stages
    )


def _with_spares(plan: Plan, ranks: Collection[int]) -> Plan:
    stage_replicas = plan.stage_replicas
    spares = tuple(sorted({*stage_replicas.spares, *ranks}))
    return plan.evolved(stage_replicas=StageReplicas(stage_replicas.stages, spares))


def _coming(now: Plan, following: Plan) -> dict[int, set[BlockKey]]:
    """The blocks that ranks will need and do not hold under the plan before."""
    found: defaultdict[int, set[BlockKey]] = defaultdict(set)
    for index, (before, after) in enumerate(zip(_holders(now), _holders(following), strict=True)):
        for place, (held, needed) in enumerate(zip(before, after, strict=True)):
            if held != needed:
                for rank in set(needed) - set(held):
                    found[rank].add((index, place))
    return found


def _holders(plan: Plan) -> list[list[tuple[int, ...]]]:
    """By part of the parameters, the owner of each block and its shadows."""
    shadows = plan.shadows or [[()] * len(blocks) for blocks in plan.blocks]
    return [
        [(owner, *ranks) for owner, ranks in zip(owners, followers, strict=True)]
        for owners, followers in zip(plan.owners, shadows, strict=True)
    ]


def _have(plan: Plan, wanted: Mapping[int, Set[BlockKey]], filled: bool) -> bool:
    """Whether ranks have all these blocks, incoming ones included if `filled`."""
    return all(
        rank == plan.owners[index][place]
        or (plan.shadows and rank in plan.shadows[index][place])
        or (filled and plan.incoming and rank in plan.incoming[index][place])
        for rank, keys in wanted.items()
        for index, place in keys
    )


def _by_block(plan: Plan, coming: Mapping[int, Set[BlockKey]]) -> tuple[Shadows, ...]:
    found: list[list[list[int]]] = [[[] for _ in blocks] for blocks in plan.blocks]
    for rank in sorted(coming):
        for index, place in coming[rank]:
            found[index][place].append(rank)
    return tuple(tuple(map(tuple, blocks)) for blocks in found)
