"""Membership events reach a worker once, and when they are news to its generation."""

from __future__ import annotations

import threading

import pytest

from holdfast.elastic.event_log import EventLog
from holdfast.elastic.generation import Generation, Identity, Member
from holdfast.elastic.membership_events import MembershipEvent, MembershipEventKind


def generation(number: int, *ranks: int, leaving: int | None = None) -> Generation:
    return Generation(
        number,
        tuple(Member(Identity(r), f"n{r}", "h:1", 1, 0, "", r == leaving) for r in ranks),
    )


def event(kind: MembershipEventKind, rank: int, of: int = 0) -> MembershipEvent:
    return MembershipEvent(kind, Identity(rank), "cause", generation=of)


@pytest.fixture
def log() -> EventLog:
    made = EventLog(Identity(0))
    made.end_agreement(generation(2, 0, 1, 2))
    return made


def test_a_loss_is_called_for_once_and_others_wait(log: EventLog) -> None:
    called: list[MembershipEvent] = []
    log.on_urgent(called.append)
    for some in (event("ended", 1), event("ended", 1), event("joining", 5), event("leaving", 2)):
        log.hear(some)
    assert called == [event("ended", 1)]
    assert log.lost == {Identity(1)}
    assert log.wanted == (event("joining", 5), event("leaving", 2))


def test_what_is_no_news_to_the_generation_is_not_called_for(log: EventLog) -> None:
    called: list[MembershipEvent] = []
    log.on_urgent(called.append)
    log.hear(event("ended", 7))  # no member
    log.hear(event("silent", 1, of=1))  # of the generation before
    log.hear(event("disturbed", 0))  # this worker itself
    log.hear(event("joining", 1))  # a member already
    assert called == []
    assert log.wanted == ()


def test_what_is_lost_while_workers_agree_is_called_for_afterwards(log: EventLog) -> None:
    called: list[MembershipEvent] = []
    log.on_urgent(called.append)
    log.begin_agreement()
    log.hear(event("ended", 1))
    log.hear(event("ended", 2))
    assert called == []
    log.end_agreement(generation(3, 0, 2))  # 1 is out of it; 2 has died meanwhile
    assert called == [event("ended", 2)]


def test_an_agreement_begins_after_the_report_that_is_under_way(log: EventLog) -> None:
    """Else it would reach a worker that has left the generation of the event."""
    begin = threading.Thread(target=log.begin_agreement)
    called: list[MembershipEvent] = []

    def call(about: MembershipEvent) -> None:
        called.append(about)
        begin.start()
        begin.join(0.1)
        assert begin.is_alive()

    log.on_urgent(call)
    log.hear(event("ended", 1))
    begin.join()
    log.hear(event("ended", 2))
    assert called == [event("ended", 1)]


def test_a_failed_agreement_leaves_the_generation_as_it_was(log: EventLog) -> None:
    called: list[MembershipEvent] = []
    log.on_urgent(called.append)
    log.begin_agreement()
    log.hear(event("ended", 1))
    log.end_agreement(None)
    assert called == [event("ended", 1)]


def test_silence_can_be_forgotten_and_an_end_cannot(log: EventLog) -> None:
    log.hear(event("silent", 1))
    log.hear(event("ended", 2))
    assert log.lost == {Identity(1), Identity(2)}
    log.forget_silence()
    assert log.lost == {Identity(2)}


def test_a_newcomer_that_ends_no_longer_wants_to_join(log: EventLog) -> None:
    log.hear(event("joining", 5))
    log.hear(event("ended", 5))
    assert log.wanted == ()


def test_the_departure_of_a_member_that_has_handed_over_is_wanted_no_more(log: EventLog) -> None:
    log.hear(event("leaving", 2))
    assert log.wanted == (event("leaving", 2),)
    log.end_agreement(generation(3, 0, 1, 2, leaving=2))
    assert log.wanted == ()


def test_events_are_drained_for_the_record_and_open_ones_stay(log: EventLog) -> None:
    log.hear(event("ended", 9))
    log.hear(event("joining", 5))
    assert log.drain() == (event("ended", 9), event("joining", 5))
    assert log.drain() == (event("joining", 5),)
