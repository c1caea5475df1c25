"""The hang rule: the limit of a wait, the awaited operation, and the rank to blame."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from holdfast.elastic.generation import Identity
from holdfast.elastic.hang import (
    HangJudge,
    HangLimits,
    Since,
    Suspicion,
    blame,
    is_excused,
    overdue_s,
    silent_operations,
    wait_of,
)
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.comm import FlightRecord, Operation
from holdfast.parallel.comm.flight_recorder import BusyKind, Direction, Outcome

NAN = math.nan


def operation(
    direction: Direction,
    peer: int,
    *,
    waited_s: float = NAN,
    outcome: Outcome = "open",
    tag: int = 7,
    number: int = 1,
) -> Operation:
    finished_s = NAN if outcome == "open" else 1.0
    return Operation(
        number, "world", direction, direction, peer, 8, tag, outcome, 0.0, 0.0, waited_s, finished_s
    )


STEPS_S = (0.0, 1.0, 2.0)


def record(
    rank: int,
    *operations: Operation,
    generation: int = 1,
    starts_s: tuple[float, ...] = STEPS_S,
    step: int = 5,
) -> FlightRecord:
    return FlightRecord(rank, 100 + rank, generation, step, 0.0, operations, starts_s)


def at(now_s: float) -> Since:
    return lambda moment_s: now_s - moment_s


@pytest.mark.parametrize(
    ("waits", "culprits"),
    [
        ({}, set()),
        ({0: {1}, 2: {1}}, {1}),
        ({0: {1}, 1: {2}, 2: {3}}, {3}),
        ({0: {1, 2}, 3: {2}}, {1, 2}),
        ({0: {1}, 1: {0}}, {0}),
        ({0: {1}, 1: {2}, 2: {0}, 3: {2}}, {2}),
    ],
)
def test_who_is_waited_for_and_waits_for_nobody_hangs(
    waits: dict[int, set[int]], culprits: set[int]
) -> None:
    assert blame({rank: frozenset(peers) for rank, peers in waits.items()}) == culprits


def test_a_wait_is_too_long_when_it_exceeds_the_time_out_and_five_median_steps() -> None:
    limits = HangLimits(10.0, startup_grace_s=60.0)
    assert limits.of(record(0, starts_s=(0.0, 1.0, 2.0))) == 10.0
    slow = record(0, operation("receive", 1, waited_s=0.0), starts_s=(0.0, 4.0, 8.0, 40.0))
    assert limits.of(slow) == 20.0
    assert wait_of(slow, [], at(19.0), limits) is None
    found = wait_of(slow, [], at(21.0), limits)
    assert found is not None
    assert (found.peers, found.seconds) == (frozenset({1}), 21.0)


def test_before_two_steps_are_known_the_grace_of_the_start_holds() -> None:
    limits = HangLimits(10.0, startup_grace_s=60.0)
    for starts_s in ((), (3.0,)):
        young = record(0, operation("receive", 1, waited_s=0.0), starts_s=starts_s)
        assert wait_of(young, [], at(59.0), limits) is None
        assert wait_of(young, [], at(61.0), limits) is not None
    assert limits.of(record(0, starts_s=(3.0, 4.0))) == 10.0
    assert HangLimits(100.0, startup_grace_s=60.0).of(record(0, starts_s=())) == 100.0


@pytest.mark.parametrize(
    ("busy", "until_s", "ended_s", "waited_s", "excused"),
    [
        (None, 0.0, 0.0, 9.0, True),  # no wait is too long
        (None, 0.0, 0.0, 11.0, False),
        ("save", 100.5, 0.0, 50.0, True),  # it may save until then
        ("save", 99.5, 0.0, 50.0, False),  # and has said so in vain
        ("load", 99.5, 95.0, 50.0, False),
        (None, 100.5, 95.0, 50.0, True),  # it has ended, and is given as long as any wait
        (None, 100.5, 89.0, 50.0, False),
    ],
)
def test_a_busy_rank_is_excused_until_it_said_it_would_be_done_and_for_a_wait_after(
    busy: BusyKind | None, until_s: float, ended_s: float, waited_s: float, excused: bool
) -> None:
    accused = replace(record(1), busy=busy, busy_until_s=until_s, busy_ended_s=ended_s)
    limits = HangLimits(10.0, startup_grace_s=60.0)
    assert is_excused(accused, waited_s, 100.0, at(100.0), limits) is excused


def test_a_newcomer_is_given_the_grace_of_the_start_by_ranks_that_know_their_steps() -> None:
    limits = HangLimits(10.0, startup_grace_s=60.0)
    newcomer = record(1, starts_s=(90.0,))
    assert is_excused(newcomer, 59.0, 100.0, at(100.0), limits)
    assert not is_excused(newcomer, 61.0, 100.0, at(100.0), limits)


def test_what_is_not_waited_for_is_no_wait() -> None:
    running = record(0, operation("receive", 1), operation("send", 2, waited_s=0.0, outcome="done"))
    assert wait_of(running, [], at(1e6), HangLimits(10.0)) is None


def test_a_chain_of_waits_is_blamed_on_its_end_by_records_and_by_agents_alike() -> None:
    records = [
        record(0, operation("receive", 1, waited_s=0.0)),
        record(1, operation("receive", 2, waited_s=1.0)),
        record(2),
    ]
    found = silent_operations(records, at(60.0), HangLimits(30.0))
    assert [(s.rank, s.suspects, s.verdict) for s in found] == [
        (0, (2,), "the peer never started it"),
        (1, (2,), "the peer never started it"),
    ]
    waits = {0: frozenset({1}), 1: frozenset({2})}
    assert tuple(blame(waits)) == found[0].suspects
    text = found[0].describe()
    assert text.startswith("rank 0: receive from rank 1 (world, tag 7, 8 bytes) silent for 60.0 s")
    assert text.endswith("in step 5: the peer never started it; suspected: rank 2")
    early = record(0, operation("receive", 2, waited_s=0.0), step=0)
    (found_early,) = silent_operations([early], at(600.0), HangLimits(30.0))
    assert "before its first step" in found_early.describe()


def test_a_circle_of_waits_is_broken_at_one_rank_by_records_and_by_agents_alike() -> None:
    records = [record(r, operation("receive", (r + 1) % 3, waited_s=0.0)) for r in range(3)]
    found = silent_operations(records, at(60.0), HangLimits(30.0))
    assert {s.suspects for s in found} == {(0,)}
    assert blame({r: frozenset({(r + 1) % 3}) for r in range(3)}) == {0}


def test_of_a_rank_that_was_replaced_the_newest_record_counts() -> None:
    old = record(1, operation("receive", 2, waited_s=0.0), generation=1)
    new = record(1, operation("send", 0, outcome="done"), generation=2)
    waiting = record(0, operation("receive", 1, waited_s=0.0), generation=2)
    (found,) = silent_operations([waiting, old, new], at(60.0), HangLimits(30.0))
    assert found.suspects == (1,)
    assert found.verdict == "the peer has finished it, it has not arrived"


def waiting(rank: int, peers: str, generation: int = 3, age_s: float = 10.0) -> MembershipEvent:
    return MembershipEvent(
        "waiting", Identity(rank), f"has waited for {peers}", age_s, "", generation, peers
    )


def test_a_judge_waits_for_all_waits_and_forgets_them_with_their_generation() -> None:
    judge = HangJudge()
    judge.enter(3)
    judge.hear(waiting(0, "1"), 10.0)
    judge.hear(waiting(3, "0", generation=2), 10.0)
    assert judge.suspicions(10.5) == []
    judge.hear(waiting(1, "2"), 10.5)
    assert judge.suspicions(11.5) == [
        Suspicion(2, 11.0, "hung: rank 1 has waited for 2", in_circle=False)
    ]
    judge.enter(4)
    assert judge.suspicions(99.0) == []


def test_a_wait_that_has_ended_blames_no_rank_any_more() -> None:
    judge = HangJudge()
    judge.enter(3)
    judge.hear(waiting(0, "1"), 10.0)  # rank 1 was slow, and went on
    judge.hear(waiting(0, ""), 20.0)
    judge.hear(waiting(2, "0"), 30.0)
    assert [(s.rank, s.waited_s) for s in judge.suspicions(32.0)] == [(0, 12.0)]


def test_a_rank_of_a_circle_is_suspected_as_one_that_waits_itself() -> None:
    judge = HangJudge()
    judge.enter(3)
    judge.hear(waiting(0, "1"), 10.0)
    judge.hear(waiting(1, "0"), 10.0)
    assert [(s.rank, s.in_circle) for s in judge.suspicions(12.0)] == [(0, True)]


def test_the_wait_of_a_lost_rank_blames_no_rank() -> None:
    judge = HangJudge()
    judge.enter(3)
    judge.hear(waiting(0, "1"), 10.0)
    judge.hear(waiting(1, "2"), 10.0)
    judge.hear(waiting(2, "1"), 10.0)
    assert [s.rank for s in judge.suspicions(12.0)] == [1]
    judge.forget(Identity(1))  # killed: nothing says any more that its wait is over
    judge.hear(waiting(0, ""), 12.0)
    judge.hear(waiting(2, ""), 12.0)
    assert judge.suspicions(20.0) == []


@pytest.mark.parametrize(
    ("busy", "until_s", "operations", "expected_s"),
    [
        (None, 80.0, (), 0.0),
        ("evaluate", 95.0, (), 0.0),  # for no longer than a wait may last
        ("evaluate", 80.0, (), 20.0),
        ("build", 80.0, (operation("receive", 1, waited_s=85.0),), 0.0),  # others are to blame
        ("build", 80.0, (replace(operation("send", 1, outcome="done"), finished_s=95.0),), 0.0),
        ("build", 80.0, (replace(operation("send", 1, outcome="done"), finished_s=85.0),), 15.0),
    ],
)
def test_a_rank_that_is_busy_for_too_long_hangs_though_no_rank_waits_for_it(
    busy: BusyKind | None, until_s: float, operations: tuple[Operation, ...], expected_s: float
) -> None:
    own = replace(record(1, *operations), busy=busy, busy_until_s=until_s)
    assert overdue_s(own, at(100.0), HangLimits(10.0)) == expected_s
