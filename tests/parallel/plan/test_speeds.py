"""Micro-batches are divided by the speeds of ranks: whole, in the least time, and for all alike."""

from __future__ import annotations

import itertools

from hypothesis import given, settings, strategies as st

from holdfast.parallel.layout.mesh import AXES, Mesh
from holdfast.parallel.plan.initial import make_plan
from holdfast.parallel.plan.plan import Plan, Slowness
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.plan.replan import relieved
from holdfast.parallel.plan.serialization import plan_from_data, plan_to_data
from holdfast.parallel.plan.speeds import makespan
from holdfast.parallel.schedules import Op, check_programs
from support.runs.plans import small_layers

MICRO_BATCHES = 12
LEVELS = (125, 200, 300, 800, 3200)


def plan_of(data: int, pipeline: int, tensor: int = 1) -> Plan:
    sizes = Mesh.of(tensor=tensor, data=data, pipeline=pipeline).sizes
    return make_plan(
        small_layers(8, tensor, shards=tensor, sequence_parallel=tensor > 1),
        Mesh(tuple(AXES.values()), sizes, tensor, 1, sequence_parallel=tensor > 1),
        virtual=1,
        schedule="1f1b",
        micro_batches=MICRO_BATCHES,
        block_elements=2000,
    )


def slow_ranks(ranks: int) -> st.SearchStrategy[Slowness]:
    some = st.dictionaries(st.integers(0, ranks - 1), st.sampled_from(LEVELS), max_size=ranks)
    return some.map(lambda found: tuple(sorted(found.items())))


@given(st.sampled_from([(4, 1, 1), (3, 2, 1), (2, 2, 2), (2, 4, 1)]), st.data())
@settings(max_examples=25, deadline=None)
def test_every_stage_computes_every_micro_batch_once_and_no_later(
    sizes: tuple[int, int, int], data: st.DataObject
) -> None:
    plan = plan_of(*sizes)
    slowness = data.draw(slow_ranks(plan.stage_replicas.size))
    found = relieved(plan, slowness)
    for stage in range(found.stage_replicas.pipeline):
        replicas = range(found.stage_replicas.replicas(stage))
        shares = [found.micro_batches_of(stage, replica) for replica in replicas]
        assert sorted(itertools.chain(*shares)) == list(range(MICRO_BATCHES))
        assert all(shares), "a replica without work is set aside"
    assert makespan(found, slowness) <= makespan(plan, slowness)
    assert found.stage_replicas.ranks == plan.stage_replicas.ranks
    assert plan_from_data(plan, plan_to_data(found)).micro_batches == found.micro_batches
    assert plan_from_data(plan, plan_to_data(found)).assignment == found.assignment
    firsts = [held[0] for stage in found.stage_replicas.stages for held in stage]
    programs = {rank: training_program(found, rank) for rank in firsts}
    check_programs(programs, len(plan.placement), range(MICRO_BATCHES))


@given(slow_ranks(4), st.integers(4, 40))
@settings(max_examples=25, deadline=None)
def test_the_time_is_the_least_that_whole_micro_batches_allow(slow: Slowness, count: int) -> None:
    plan = make_plan(
        small_layers(2, 1),
        Mesh.of(data=4),
        virtual=1,
        schedule="1f1b",
        micro_batches=count,
        block_elements=2000,
    )
    times = [dict(slow).get(rank, 100) for rank in range(4)]
    # The least time T in which the ranks together can end them all, tried one after another.
    ends = sorted({n * t for t in times for n in range(1, count + 1)})
    least = next(end for end in ends if sum(end // t for t in times) >= count)
    assert round(100 * makespan(relieved(plan, slow), slow)) == least


def test_ranks_that_are_well_again_get_the_plan_of_the_configuration() -> None:
    plan = plan_of(4, 1)
    slow = relieved(plan, ((2, 3200),))
    assert slow.stage_replicas.spares == (2,)
    assert {n for own in slow.micro_batches for n in own} == set(range(MICRO_BATCHES))
    again = relieved(slow, ())
    assert again.stage_replicas == plan.stage_replicas
    assert again.micro_batches == plan.micro_batches


def test_a_slow_rank_of_one_stage_changes_no_other_stage() -> None:
    plan = plan_of(2, 2)
    stages = plan.stage_replicas.stages
    found = relieved(plan, ((stages[1][0][0], 300),))
    assert [len(found.micro_batches_of(0, r)) for r in range(2)] == [6, 6]
    assert [len(found.micro_batches_of(1, r)) for r in range(2)] == [3, 9]
    program = training_program(found, stages[1][1][0])
    assert len({a.micro_batch for a in program if a.op is Op.FORWARD}) == 9
