"""The hang rule: the limit of a wait, the awaited operation, and the rank to blame."""

from __future__ import annotations

import math

import pytest

from holdfast.elastic.generation import Identity
from holdfast.elastic.hang import HangJudge, blame, limit_s, silent_operations, wait_of
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.comm import FlightRecord, Operation
from holdfast.parallel.comm.flight_recorder import Direction, Outcome

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


def record(
    rank: int, *operations: Operation, generation: int = 1, starts_s: tuple[float, ...] = ()
) -> FlightRecord:
    return FlightRecord(rank, 100 + rank, generation, 5, 0.0, operations, starts_s)


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
    assert limit_s(record(0), 10.0) == 10.0
    assert limit_s(record(0, starts_s=(0.0, 1.0, 2.0)), 10.0) == 10.0
    slow = record(0, operation("receive", 1, waited_s=0.0), starts_s=(0.0, 4.0, 8.0, 40.0))
    assert limit_s(slow, 10.0) == 20.0
    assert wait_of(slow, [], 19.0, hang_timeout_s=10.0) is None
    found = wait_of(slow, [], 21.0, hang_timeout_s=10.0)
    assert found is not None
    assert (found.peers, found.seconds) == (frozenset({1}), 21.0)


def test_what_is_not_waited_for_is_no_wait() -> None:
    running = record(0, operation("receive", 1), operation("send", 2, waited_s=0.0, outcome="done"))
    assert wait_of(running, [], 1e6, hang_timeout_s=10.0) is None


def test_a_chain_of_waits_is_blamed_on_its_end_by_records_and_by_agents_alike() -> None:
    records = [
        record(0, operation("receive", 1, waited_s=0.0)),
        record(1, operation("receive", 2, waited_s=1.0)),
        record(2),
    ]
    found = silent_operations(records, 60.0, hang_timeout_s=30.0)
    assert [(s.rank, s.suspects, s.verdict) for s in found] == [
        (0, (2,), "the peer never started it"),
        (1, (2,), "the peer never started it"),
    ]
    waits = {0: frozenset({1}), 1: frozenset({2})}
    assert tuple(blame(waits)) == found[0].suspects
    text = found[0].describe()
    assert text.startswith("rank 0: receive from rank 1 (world, tag 7, 8 bytes) silent for 60.0 s")
    assert text.endswith("in step 5: the peer never started it; suspected: rank 2")


def test_a_circle_of_waits_is_broken_at_one_rank_by_records_and_by_agents_alike() -> None:
    records = [record(r, operation("receive", (r + 1) % 3, waited_s=0.0)) for r in range(3)]
    found = silent_operations(records, 60.0, hang_timeout_s=30.0)
    assert {s.suspects for s in found} == {(0,)}
    assert blame({r: frozenset({(r + 1) % 3}) for r in range(3)}) == {0}


def test_of_a_rank_that_was_replaced_the_newest_record_counts() -> None:
    old = record(1, operation("receive", 2, waited_s=0.0), generation=1)
    new = record(1, operation("send", 0, outcome="done"), generation=2)
    waiting = record(0, operation("receive", 1, waited_s=0.0), generation=2)
    (found,) = silent_operations([waiting, old, new], 60.0, hang_timeout_s=30.0)
    assert found.suspects == (1,)
    assert found.verdict == "the peer has finished it, it has not arrived"


def test_a_judge_waits_for_all_waits_and_forgets_them_with_their_generation() -> None:
    judge = HangJudge()
    judge.enter(3)

    def waiting(rank: int, peers: str, generation: int = 3) -> MembershipEvent:
        return MembershipEvent(
            "waiting", Identity(rank), f"has waited for {peers}", generation=generation, peers=peers
        )

    judge.hear(waiting(0, "1"), 10.0)
    judge.hear(waiting(3, "0", generation=2), 10.0)
    assert judge.culprits(10.5) == {}
    judge.hear(waiting(1, "2"), 10.6)
    assert judge.has(Identity(1))
    assert not judge.has(Identity(3))
    assert judge.culprits(11.0) == {2: "hung: rank 1 has waited for 2"}
    judge.enter(4)
    assert judge.culprits(99.0) == {}
