"""The list scheduler: sound programs for any assignment, within any admissible cap, and short."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules import (
    Action,
    Op,
    check_programs,
    list_schedule,
    placement,
    simulate,
    unit_cost,
    with_messages,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_assignment_and_any_cap_from_the_minimum_up_gives_sound_programs(data: st.DataObject):
    chunks = data.draw(st.integers(1, 8))
    micro_batches = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True))
    ranks = data.draw(st.integers(1, 5))
    chooser = random.Random(data.draw(st.integers(0, 2**32)))
    owner = {(c, m): chooser.randrange(ranks) for c in range(chunks) for m in micro_batches}
    speeds = [chooser.choice([0.5, 1, 1, 3]) for _ in range(ranks)]
    spare = data.draw(st.sampled_from([0, 0, 1, 5]))
    owned = {r: len({c for (c, _), o in owner.items() if o == r}) for r in set(owner.values())}
    cap = {rank: count + spare for rank, count in owned.items()}

    def cost(action: Action) -> float:
        weight = 2 if action.op is Op.BACKWARD else 1
        return weight * speeds[owner[action.chunk, action.micro_batch]]

    def owner_of(chunk: int, micro_batch: int) -> int:
        return owner[chunk, micro_batch]

    programs = list_schedule(
        chunks,
        micro_batches,
        owner_of,
        cost,
        message_cost=data.draw(st.sampled_from([0.0, 0.3])),
        cap=cap,
        split_backward=data.draw(st.booleans()),
    )
    check_programs(with_messages(programs, owner_of), chunks, micro_batches, cap=cap)


@pytest.mark.parametrize(
    ("pipeline", "micro_batches", "split", "makespan"),
    [(4, 8, False, 33.0), (4, 8, True, 27.0), (8, 32, False, 117.0), (8, 32, True, 103.0)],
)
def test_even_plans_come_out_as_short_as_1f1b_and_zb_h1_with_their_memory(
    pipeline: int, micro_batches: int, split: bool, makespan: float
):
    programs = list_schedule(
        pipeline,
        range(micro_batches),
        lambda chunk, _: chunk,
        unit_cost(),
        cap=pipeline,
        split_backward=split,
    )
    assert simulate(programs, unit_cost()).makespan == makespan


@pytest.mark.parametrize(("pipeline", "micro_batches", "makespan"), [(4, 8, 25.5), (8, 32, 99.5)])
def test_v_placement_comes_out_as_short_as_zb_v_with_its_memory(
    pipeline: int, micro_batches: int, makespan: float
):
    placed = placement("zb-v", pipeline, 2)
    programs = list_schedule(
        2 * pipeline,
        range(micro_batches),
        lambda chunk, _: placed[chunk],
        unit_cost(virtual=2),
        cap=2 * pipeline,
        split_backward=True,
    )
    assert simulate(programs, unit_cost(virtual=2)).makespan == makespan


def replica_lost(chunk: int, micro_batch: int) -> int:
    """Two replicas of four stages (ranks 2 * stage + replica), of which stage 1 lost its second."""
    replica = 0 if chunk == 1 else micro_batch % 2
    return 2 * chunk + replica


def test_a_lost_stage_replica_makes_its_partner_the_bottleneck_and_nothing_else():
    programs = list_schedule(4, range(16), replica_lost, unit_cost(), cap=8)
    check_programs(with_messages(programs, replica_lost), 4, range(16), cap=8)
    timeline = simulate(programs, unit_cost())
    # Rank 2 computes all 16 micro-batches of its stage; others fill and drain around it.
    assert timeline.busy[2] == 48
    assert timeline.makespan <= 48 + 3 * 3
    assert set(programs) == {0, 1, 2, 4, 5, 6, 7}


def test_a_slow_rank_is_kept_busy():
    def cost(action: Action) -> float:
        return unit_cost()(action) * (2 if action.chunk == 2 else 1)

    programs = list_schedule(4, range(16), lambda chunk, _: chunk, cost, cap=4)
    timeline = simulate(programs, cost)
    assert timeline.busy[2] == 96
    assert timeline.makespan <= 96 + 2 + 1 + 2 + 2 * 2


def test_simulated_messages_cost_what_the_scheduler_was_told():
    programs = list_schedule(
        2, range(4), lambda chunk, _: chunk, unit_cost(), message_cost=lambda a, b: 0.5
    )
    timeline = simulate(programs, unit_cost(), message_cost=0.5)
    assert timeline.makespan == 3 * 4 + 3 + 2 * 0.5


def test_an_impossible_cap_says_what_is_needed():
    with pytest.raises(
        ScheduleError, match=r"rank 0 computes 2 chunks and may keep 1 .* at least 2"
    ):
        list_schedule(4, range(3), lambda chunk, _: chunk % 2, unit_cost(), cap={0: 1, 1: 2})


def test_the_same_input_gives_the_same_programs():
    first = list_schedule(4, range(16), replica_lost, unit_cost(), cap=6)
    assert first == list_schedule(4, range(16), replica_lost, unit_cost(), cap=6)
