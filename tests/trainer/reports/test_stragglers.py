"""Slow ranks are found by pure rules, from the times that all ranks report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from holdfast.parallel.layout.mesh import AXES, Mesh
from holdfast.parallel.plan.initial import make_plan
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.replan import Roster, replan
from holdfast.parallel.schedules import TIMED_PHASES
from holdfast.trainer.reports.stragglers import PhaseClock
from holdfast.trainer.step.vote.slowness import (
    RankTimes,
    find_stragglers,
    further_work,
    lasting,
    others_wait_for,
    slowness_of,
    waited_for,
    with_loads,
    work_of,
)
from support.runs.plans import first_plan, small_layers


def plan_of(data: int, pipeline: int, tensor: int = 1) -> Plan:
    sizes = Mesh.of(tensor=tensor, data=data, pipeline=pipeline).sizes
    return make_plan(
        small_layers(8, tensor, shards=tensor, sequence_parallel=tensor > 1),
        Mesh(tuple(AXES.values()), sizes, tensor, 1, sequence_parallel=tensor > 1),
        virtual=1,
        schedule="1f1b",
        micro_batches=12,
        block_elements=2000,
    )


def usual(plan: Plan, rank: int, per_work: float = 1.0) -> RankTimes:
    """Times of a rank that works at the common speed, most of them spent computing."""
    work = work_of(plan, rank)
    most = work / max(work_of(plan, other) for other in plan.stage_replicas.ranks)
    return RankTimes(tuple(per_work * most * share for share in (0.8, 0.1, 0.0, 0.1)), work)


def waiting(plan: Plan, rank: int, seconds: float) -> RankTimes:
    return usual(plan, rank)._replace(noise_s=0.001, waited_s=seconds)


def times_by(factor: float, times: RankTimes) -> RankTimes:
    """The same work in a multiple of the time."""
    return RankTimes(tuple(factor * t for t in times.phases), times.work)


@given(
    st.sampled_from([(2, 1), (4, 1), (3, 2), (2, 4)]),
    st.data(),
    st.floats(2.2, 50.0),
    st.floats(0.05, 10.0),
)
def test_the_slow_rank_is_found_and_nobody_else(
    mesh: tuple[int, int], data: st.DataObject, slowness: float, step_s: float
) -> None:
    plan = plan_of(*mesh)
    slow = data.draw(st.sampled_from(plan.stage_replicas.ranks))
    phase = data.draw(st.sampled_from(range(len(TIMED_PHASES))))
    noise = {rank: data.draw(st.floats(0.85, 1.15)) for rank in plan.stage_replicas.ranks}
    times = {
        rank: times_by(noise[rank], usual(plan, rank, step_s)) for rank in plan.stage_replicas.ranks
    }
    assert find_stragglers(plan, times, 2.0) == []
    longer = list(times[slow].phases)
    longer[phase] += 1.4 * (slowness - 1) * sum(usual(plan, slow, step_s).phases)
    times[slow] = RankTimes(tuple(longer), times[slow].work)
    (found,) = find_stragglers(plan, times, 2.0)
    assert (found.rank, found.phase) == (slow, TIMED_PHASES[phase])
    assert found.ratio > 2.0


def test_more_work_after_a_loss_is_not_slowness() -> None:
    full = plan_of(4, 2)
    ranks = tuple(rank for rank in full.stage_replicas.ranks if rank != 1)
    roster = Roster(ranks, {rank: "node" for rank in full.stage_replicas.ranks})
    plan = replan(full, roster, generation=1, move_layers=False)
    work = {work_of(plan, rank) for rank in ranks}
    assert max(work) > 1.25 * min(work)
    assert find_stragglers(plan, {rank: usual(plan, rank) for rank in ranks}, 1.2) == []


def test_a_rank_of_a_smaller_replica_is_not_slow_because_it_has_more_of_each_micro_batch() -> None:
    full = plan_of(2, 1, tensor=4)
    plan = replan(
        full, Roster((0, 2, 3, 4, 5, 6, 7), dict.fromkeys(range(8), "node")), generation=1
    )
    counts = {0: 3, 3: 1, 4: 8}
    assert {rank: len(plan.micro_batches_of(0, at)) for at, rank in enumerate(counts)} == counts
    # A micro-batch takes two ranks twice as long as four, and one rank four times.
    shards = {0: 2, 2: 2, 3: 1, 4: 4, 5: 4, 6: 4, 7: 4}
    times = {
        rank: RankTimes(
            (counts.get(rank, counts[0 if rank < 4 else 4]) / of, 0.0, 0.0, 0.0),
            work_of(plan, rank),
        )
        for rank, of in shards.items()
    }
    assert find_stragglers(plan, times, 1.2) == []


def test_a_rank_alone_and_very_short_steps_are_never_slow() -> None:
    alone = plan_of(1, 1)
    assert find_stragglers(alone, {0: RankTimes((9.0, 0, 0, 0), 1.0)}, 2.0) == []
    two = plan_of(2, 1)
    short = {0: RankTimes((0.0001, 0, 0, 0), 1.0), 1: RankTimes((0.001, 0, 0, 0), 1.0)}
    assert find_stragglers(two, short, 2.0) == []


def test_slow_is_what_computes_less_in_a_time_and_not_what_has_longer_documents() -> None:
    plan = plan_of(4, 1)
    times = {rank: usual(plan, rank) for rank in range(4)}
    claimed = {**times, 2: RankTimes(times[2].phases, times[2].work / 3)}
    assert slowness_of(plan, claimed) == ((2, 300),)
    assert [s.rank for s in find_stragglers(plan, claimed, 2.0)] == [2]
    compute, *others = times[2].phases
    longer = {**times, 2: RankTimes((3 * compute, *others), 3 * times[2].work)}
    assert slowness_of(plan, longer) == ()
    assert find_stragglers(plan, longer, 2.0) == []


def test_slow_ranks_were_slow_twice_running_and_as_slow_as_they_were_at_least() -> None:
    assert lasting([((1, 300),)]) == ()
    assert lasting([((1, 300), (2, 150)), ((1, 200), (3, 400))]) == ((1, 200),)
    assert lasting([((1, 300),), ()]) == ()


def test_among_many_ranks_the_one_that_waits_least_is_slow_by_little() -> None:
    own_s = {rank: 1.0 + rank / 1000 for rank in range(8)} | {3: 1.1}
    noise_s = dict.fromkeys(own_s, 0.01)
    waited_s = {rank: 0.5 + rank / 1000 for rank in own_s} | {3: 0.1}
    assert waited_for(own_s, noise_s, waited_s) == [3]
    assert waited_for({**own_s, 3: 1.04}, noise_s, waited_s) == []
    assert waited_for(own_s, dict.fromkeys(own_s, 0.02), waited_s) == []
    assert waited_for(own_s, noise_s, {**waited_s, 3: 0.5}) == []
    few = range(1, 8)
    assert waited_for({r: own_s[r] for r in few}, noise_s, {r: waited_s[r] for r in few}) == []


def test_a_rank_that_others_wait_for_is_reported_with_the_phase_that_takes_longer() -> None:
    plan = plan_of(12, 1)
    rows = {rank: waiting(plan, rank, 0.5 + rank / 1000) for rank in range(12)}
    assert others_wait_for(plan, rows) == []
    slow = waiting(plan, 5, 0.2)
    compute, reduce, *others = slow.phases
    rows[5] = slow._replace(phases=(compute, reduce + 0.15, *others))
    assert [s.rank for s in find_stragglers(plan, rows, 2.0)] == [5]
    (found,) = others_wait_for(plan, rows)
    assert (found.rank, found.phase) == (5, TIMED_PHASES[1])
    assert found.ratio == pytest.approx(1.15)


def test_a_slow_rank_is_reported_when_it_is_slow_twice_running_and_once() -> None:
    now = 0.0
    recorder = SimpleNamespace(blocked_s=0.0, begin_window=lambda: 0)
    plan = plan_of(2, 1)
    groups = SimpleNamespace(recorder=recorder)
    done = work_of(plan, 0)
    training: Any = SimpleNamespace(groups=groups, plan=plan, rank=0, work_done=lambda: done)
    clock = PhaseClock(clock=lambda: now)
    reported = []
    for compute_s, blocked_s in ((9.0, 0.0), (9.0, 8.0), (9.0, 0.0), (9.0, 0.0), (9.0, 0.0)):
        clock.start(training)
        now += compute_s
        recorder.blocked_s += blocked_s  # time that it waited for others is not its own
        clock.end(training, 0)
        for phase in (1, 2, 3):
            now += 0.1
            clock.end(training, phase)
        own = clock.times(training)
        training.rank_times = {0: own, 1: RankTimes((1.0, 0.1, 0.1, 0.1), done)}
        found = clock.compare(training, 2.0)
        reported.append([(s.rank, s.phase, round(s.own_s, 6)) for s in found])
    assert reported == [[], [], [], [(0, "compute", 9.3)], []]


def test_a_rank_with_sought_after_experts_is_not_slow() -> None:
    plan = first_plan(data=4, pipeline=1, count=8, experts=8, expert_ranks=4)
    loads = [[0] * 8 for _ in plan.layers]
    for layer in range(len(plan.layers)):
        if plan.hosts(layer):
            loads[layer] = [144 if 3 in ranks else 16 for ranks in plan.hosts(layer)]
    times = {}
    for rank in range(4):
        operations = work_of(plan, rank) + further_work(plan, rank, loads)
        times[rank] = RankTimes((1e-6 * operations, 0.1, 0.0, 0.1), work_of(plan, rank))
    assert sum(further_work(plan, rank, loads) for rank in range(4)) == pytest.approx(0.0)
    assert [rank for rank, _ in slowness_of(plan, times)] == [3], "the case needs an uneven load"
    assert slowness_of(plan, with_loads(plan, times, loads)) == ()
    assert find_stragglers(plan, with_loads(plan, times, loads), 1.2) == []


def test_a_clock_that_is_never_asked_keeps_the_newest_steps_alone() -> None:
    recorder = SimpleNamespace(blocked_s=0.0, begin_window=lambda: 0)
    groups = SimpleNamespace(recorder=recorder)
    training: Any = SimpleNamespace(groups=groups, work_done=lambda: 2.0)
    now = 0.0
    clock = PhaseClock(clock=lambda: now)
    for step in range(3000):
        clock.start(training)
        for phase in range(len(TIMED_PHASES)):
            now += 1.0 if step < 1000 else 3.0
            clock.end(training, phase)
    assert max(map(len, clock._phases)) <= 1024
    told = clock.times(training)
    assert (told.phases, told.work) == ((3.0,) * len(TIMED_PHASES), 2.0)
