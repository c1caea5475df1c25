"""Stage replicas of fewer ranks: every plan computes everything once, and wastes little."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings, strategies as st

from holdfast.parallel.errors import LayoutError, TooFewRanks
from holdfast.parallel.layout.mesh import AXES, Mesh
from holdfast.parallel.plan.admission import next_plan, state_of
from holdfast.parallel.plan.block_transfers import held_blocks, missing_blocks
from holdfast.parallel.plan.cost import rank_memory
from holdfast.parallel.plan.formation import Roster
from holdfast.parallel.plan.initial import make_plan, micro_batch_counts
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.plan.replan import replan, with_shadows
from holdfast.parallel.plan.serialization import plan_from_data, plan_to_data
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.schedules import RECEIVES, SENDS, Op, matching_receive
from holdfast.trainer.step.planning import with_matrices
from support.runs.plans import NODES as SCATTERED, check_moves, small_layers

MICRO_BATCHES = 12
NODES = {rank: f"node-{rank // 4}" for rank in range(64)}


@cache
def plan_with(
    tensor: int = 2,
    context: int = 1,
    data: int = 2,
    pipeline: int = 1,
    virtual: int = 1,
    *,
    matrices: bool = False,
) -> Plan:
    """A first plan with four tensor shards, eight slices of a sequence, and shadows."""
    layers = small_layers(4, tensor, shards=4, seq_len=32, sequence_parallel=True)
    degrees = {"tensor": tensor, "context": context, "data": data, "pipeline": pipeline}
    sizes = tuple(degrees.get(axis, 1) for axis in AXES)
    plan = make_plan(
        [with_matrices(layer) for layer in layers] if matrices else layers,
        Mesh(tuple(AXES.values()), sizes, 4, 8, sequence_parallel=True),
        virtual=virtual,
        schedule="interleaved-1f1b" if virtual > 1 else "1f1b",
        micro_batches=MICRO_BATCHES,
        block_elements=500,
    )
    return with_shadows(plan, Roster(plan.stage_replicas.ranks, NODES), 1)


def without(plan: Plan, *lost: int, has_room: Callable[[Plan, int], bool] | None = None) -> Plan:
    ranks = tuple(rank for rank in plan.stage_replicas.ranks if rank not in lost)
    roster = Roster(ranks, NODES, has_room=has_room)
    return replan(plan, roster, generation=plan.generation + 1, redundancy=1)


def run_programs(plan: Plan) -> None:
    """Run all ranks' programs: sends never wait, receives do. Every message must be received."""
    placed = [rank for stage in plan.stage_replicas.stages for held in stage for rank in held]
    left = {rank: list(training_program(plan, rank)) for rank in placed}
    on_its_way: Counter[tuple[int, object]] = Counter()
    while any(left.values()):
        moved = False
        for rank, actions in left.items():
            while actions:
                action = actions[0]
                if action.op in SENDS:
                    assert action.peer is not None
                    on_its_way[action.peer, matching_receive(action, rank)] += 1
                elif action.op in RECEIVES:
                    if not on_its_way[rank, action]:
                        break
                    on_its_way[rank, action] -= 1
                actions.pop(0)
                moved = True
        assert moved, "ranks wait for each other"
    assert not any(on_its_way.values())


def check(plan: Plan) -> None:
    """Each part of each slice of each micro-batch passes each layer once, and has its state."""
    mesh = plan.configured_mesh
    for stage, replicas in enumerate(plan.stage_replicas.stages):
        done: Counter[tuple[int, int, int]] = Counter()
        for replica, held in enumerate(replicas):
            smaller = mesh.by_replica_size[len(held)]
            assert plan.micro_batches_of(stage, replica), "a replica without work"
            for shard, rank in enumerate(held):
                assert plan.mesh_of(rank) == smaller
                forward = {
                    action.micro_batch
                    for action in training_program(plan, rank)
                    if action.op is Op.FORWARD
                }
                assert forward == set(plan.micro_batches_of(stage, replica))
                units = {unit // mesh.parts for unit in smaller.token_units[shard]}
                done.update(product(forward, units, plan.parts_of(rank)))
        slices = mesh.slices
        assert done == Counter(product(range(MICRO_BATCHES), range(slices), range(mesh.parts)))
    for keys in (keys for group in plan.given_together for keys in group):
        [owner] = {plan.owner(key) for key in keys}
        [followers] = {plan.followers(key) for key in keys}
        assert owner in plan.candidates(keys)
        assert owner not in followers
    for block in (block for blocks in plan.blocks for block in blocks):
        assert plan.contributors(block) == plan.holders(block)
        assert all(
            not set(plan.parts_of(rank)).isdisjoint(plan.spec_of(block).copies)
            for rank in plan.holders(block)
        )
    run_programs(plan)


@settings(max_examples=40)
@given(
    st.sampled_from([(4, 1, 1, 1), (2, 2, 2, 1), (4, 1, 2, 2, 2), (2, 1, 2, 2), (1, 4, 1, 2)]),
    st.randoms(use_true_random=False),
    st.sampled_from([NODES, SCATTERED]),
    st.booleans(),
)
def test_any_losses_and_arrivals_leave_sound_plans(
    degrees: tuple[int, ...], rng: random.Random, nodes: dict[int, str], matrices: bool
) -> None:
    first = plan = plan_with(*degrees, matrices=matrices)
    alive = set(plan.stage_replicas.ranks)
    for generation in range(1, 7):
        before = plan
        fresh: frozenset[int] = frozenset()
        absent = sorted(set(range(first.configured_mesh.size)) - alive)
        if absent and rng.random() < 0.4:
            fresh = frozenset([rng.choice(absent)])
            alive |= fresh
        elif len(alive) > 1:
            alive.discard(rng.choice(sorted(alive)))
        roster = Roster(tuple(sorted(alive)), nodes, fresh)
        plan = replan(before, roster, generation=generation, redundancy=1)
        assert set(plan.stage_replicas.ranks) == alive
        check(plan)
        assert plan_from_data(first, json.loads(json.dumps(plan_to_data(plan)))) == plan
        held = held_blocks(before, set(before.stage_replicas.ranks) & alive - fresh)
        if not missing_blocks(before, held):
            check_moves(plan, held, held_blocks(plan, plan.stage_replicas.ranks))


def test_three_of_four_go_on_as_two_and_one_each_with_what_it_can_do() -> None:
    plan = plan_with(4, data=2)
    after = without(plan, 1)
    assert after.stage_replicas.stages == (((0, 2), (3,), (4, 5, 6, 7)),)
    assert [len(after.micro_batches_of(0, replica)) for replica in range(3)] == [3, 1, 8]
    assert after.stage_replicas.spares == ()
    assert [after.mesh_of(rank).tensor for rank in (0, 3, 4)] == [2, 1, 4]
    assert [after.parts_of(rank) for rank in (0, 2, 3, 4)] == [(0, 1), (2, 3), (0, 1, 2, 3), (0,)]
    assert after.axis_groups(2) == {"tensor": (0, 2)}
    assert after.is_regular  # of one stage
    again = without(after, 0)
    assert again.stage_replicas.stages == (((3, 2), (4, 5, 6, 7)),)
    both = without(after, 6)
    # Each on its node, and with parts that it has: rank 7 has the last one.
    assert both.stage_replicas.stages == (((0, 2), (3,), (4, 7), (5,)),)


def test_a_rank_with_more_parts_owns_as_much_as_others() -> None:
    """It would else have the state of a third of each of its parts."""
    after = without(plan_with(4, data=2), 1)
    owned: Counter[int] = Counter()
    for block in (block for blocks in after.blocks for block in blocks):
        owned[after.owner(block.key)] += block.elements
    mean = sum(owned.values()) / 7
    assert max(owned.values()) < 1.5 * mean


def test_a_replica_is_whole_again_when_ranks_come_back() -> None:
    first = plan_with(4, data=2, pipeline=2)
    after = without(without(first, 1), 12)
    ranks = first.stage_replicas.ranks
    roster = Roster(ranks, NODES, frozenset({1, 12}))
    between = next_plan(after, roster, filled=True, generation=3, redundancy=1)
    assert between.stage_replicas.stages == after.stage_replicas.stages
    assert set(between.stage_replicas.spares) == {1, 12}
    whole = next_plan(between, Roster(ranks, NODES), filled=True, generation=4, redundancy=1)
    assert whole.stage_replicas == first.stage_replicas
    held = state_of(between, ranks, filled=True)
    assert all(keys <= held[rank] for rank, keys in held_blocks(whole, ranks).items())


def test_a_stage_that_is_left_with_less_than_a_replica_keeps_its_layers() -> None:
    """Two stages of two ranks that lose one each do not become one stage of two."""
    first = plan_with(2, data=1, pipeline=2, virtual=2)
    after = without(without(first, 0), 3)
    assert after.stage_replicas.stages == (((1,),), ((2,),))
    assert after.chunk_layers == first.chunk_layers
    assert all(after.chunks_of(rank) == first.chunks_of(rank) for rank in (1, 2))


def test_ranks_whose_memory_does_not_suffice_are_spares() -> None:
    plan = plan_with(4, data=2)

    def bytes_of(of: Plan, rank: int) -> int:
        return rank_memory(of, rank, precision=PRECISIONS["fp32"], owned_bytes=12, exact=True).total

    free = without(plan, 1)
    most = bytes_of(free, 0)
    assert min(bytes_of(free, 3), most) > bytes_of(plan, 0)
    most = (bytes_of(free, 3) + most) // 2
    asked = []

    def has_room(of: Plan, rank: int) -> bool:
        asked.append(rank)
        return bytes_of(of, rank) <= most

    after = without(plan, 1, has_room=has_room)
    assert after.stage_replicas.stages == (((0, 2), (4, 5, 6, 7)),)
    assert after.stage_replicas.spares == (3,)
    assert not {4, 5, 6, 7}.intersection(asked)
    none = without(plan, 1, has_room=lambda of, rank: False)
    assert none.stage_replicas.spares == (0, 2, 3)
    check(after)


def test_without_room_for_a_smaller_replica_too_few_ranks_are_said_to_be_too_few() -> None:
    with pytest.raises(TooFewRanks, match="3 ranks are left, but a stage replica takes 4"):
        without(plan_with(4, data=1), 1, has_room=lambda of, rank: False)


def test_replicas_that_share_parameters_stay_whole() -> None:
    plan = plan_with(4, data=2)
    shared = plan.evolved(shard="gradients")
    assert without(shared, 1).stage_replicas.spares == (0, 2, 3)


def test_plans_of_other_sizes_are_refused() -> None:
    first = plan_with(4, data=2)
    data = plan_to_data(without(first, 1))
    data["stages"] = [[[0, 2, 3], [4, 5, 6, 7]]]
    with pytest.raises(LayoutError, match="has 3 ranks, not 4 or 2 or 1"):
        plan_from_data(first, data)


@given(st.integers(1, 200), st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=12))
def test_the_last_replica_is_done_as_early_as_it_can_be(count: int, sizes: list[int]) -> None:
    counts = micro_batch_counts(count, sizes)
    assert sum(counts) == count
    longest = max(own / size for own, size in zip(counts, sizes, strict=True))
    # In less time not all can be done: each would do fewer.
    shorter = longest - 1e-9
    assert sum(int(shorter * size) for size in sizes) < count
