"""The rule of agreement: plain cases, and no order of events splits a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from holdfast.elastic.agreement import AcceptorState, Report, Verdict, advance, generation_of
from holdfast.elastic.agreement.reports import report_from_data, report_to_data
from holdfast.elastic.agreement.rule import is_majority
from holdfast.elastic.generation import (
    Generation,
    Identity,
    format_identities,
    parse_identities,
)
from holdfast.parallel.errors import MembershipError, Superseded

identities = st.builds(Identity, st.integers(0, 30), st.integers(0, 2))


def ids(text: str) -> frozenset[Identity]:
    return parse_identities(text)


def reports(*given: Report) -> dict[Identity, Report]:
    return {report.identity: report for report in given}


def member(rank: str, acceptor: AcceptorState, **fields: object) -> Report:
    return Report(next(iter(ids(rank))), acceptor, **fields)  # type: ignore[arg-type]


def of(members: str, generation: int = 1, accepted: str = "") -> AcceptorState:
    return AcceptorState(generation, ids(members), ids(accepted))


def outcome(own: str, acceptor: AcceptorState, *others: Report, **fields: object) -> Verdict:
    mine = member(own, acceptor, **fields)
    return advance(mine, reports(mine, *others))


@given(st.frozensets(identities))
def test_a_set_of_identities_survives_its_text(some: frozenset[Identity]) -> None:
    assert parse_identities(format_identities(some)) == some


def test_the_text_of_a_thousand_ranks_is_short() -> None:
    some = {Identity(rank) for rank in range(1000)} - {Identity(7)} | {Identity(7, 2)}
    assert format_identities(some) == "0-6,7.2,8-999"


@pytest.mark.parametrize("text", ["x", "1-", "3.2.1", "-1", "1,,2"])
def test_a_text_that_names_nobody_is_refused(text: str) -> None:
    with pytest.raises(MembershipError, match="RANK"):
        parse_identities(text)


def test_a_report_survives_its_text() -> None:
    report = member("3.1", of("0-3,5", 4, "0-2"), lost=ids("3"), leaving=True, data={"a": [1]})
    assert report_from_data(report_to_data(report)) == report


def test_a_report_of_another_version_is_refused() -> None:
    with pytest.raises(MembershipError, match="same version"):
        report_from_data({"identity": "1", "colour": "red"})


def test_the_first_generation_waits_for_every_rank() -> None:
    late = member("2", AcceptorState(), founder=True)
    verdict = outcome("0", AcceptorState(), late, world_size=3, founder=True)
    assert verdict.outcome == "wait"
    assert "ranks 1 to start" in verdict.reason


def test_replacements_do_not_found_a_run_that_may_exist_elsewhere() -> None:
    assert (
        outcome("0.1", AcceptorState(), member("1.1", AcceptorState()), world_size=2).outcome
        == "wait"
    )


def test_all_accept_and_then_agree() -> None:
    first = outcome("0", of("0-2"), member("1", of("0-2")), lost=ids("2"))
    assert first == Verdict(of("0-2", 1, "0-1"), "again")
    second = outcome("0", first.acceptor, member("1", first.acceptor))
    assert second == Verdict(of("0-1", 2), "agreed")


def test_somebody_missing_without_a_reason_is_waited_for() -> None:
    assert outcome("0", of("0-2"), member("1", of("0-2"))).outcome == "wait"
    told = member("1", of("0-2"), lost=ids("2"))
    assert outcome("0", of("0-2"), told).outcome == "again"


@pytest.mark.parametrize(
    "stranger",
    [
        member("2.1", AcceptorState(), lost=ids("1")),
        member("2", of("0-3"), lost=ids("0-1")),
    ],
    ids=["one that joins", "one that was left out"],
)
def test_no_member_is_left_out_because_a_stranger_has_waited_or_not_heard_of_it(
    stranger: Report,
) -> None:
    verdict = outcome("0", of("0-1", 2), stranger)
    assert (verdict.outcome, verdict.reason) == ("wait", "waiting for ranks 1")
    assert outcome("0", of("0-1", 2), stranger, lost=ids("1")).outcome == "again"


def test_a_worker_that_was_left_out_is_not_taken_for_one_that_joins() -> None:
    others = (member("1", of("0-1", 2)), member("2", of("0-3")), member("3.1", of("0-1", 2)))
    assert outcome("0", of("0-1", 2), *others).acceptor.accepted == ids("0-1,3.1")
    with pytest.raises(Superseded):
        outcome("2", of("0-3"), member("0", of("0-1", 2)), *others)


def test_a_minority_waits() -> None:
    verdict = outcome("3", of("0-4"), member("4", of("0-4")), lost=ids("0-2"))
    assert (verdict.outcome, verdict.minority) == ("wait", True)
    assert "no majority of generation 1 (ranks 0-4)" in verdict.reason


def test_of_two_halves_the_one_with_the_lowest_rank_goes_on() -> None:
    low = outcome("0", of("0-3"), member("1", of("0-3")), lost=ids("2-3"))
    high = outcome("2", of("0-3"), member("3", of("0-3")), lost=ids("0-1"))
    assert (low.outcome, high.outcome) == ("again", "wait")


def test_a_dead_worker_reports_through_its_agent_and_is_left_out() -> None:
    dead = member("0", of("0-1"), alive=False)
    assert outcome("1", of("0-1"), dead) == Verdict(of("0-1", 1, "1"), "again")


def test_what_a_dead_worker_accepted_binds_the_others() -> None:
    dead = member("0", of("0-2", 1, "0-1"), alive=False)
    verdict = outcome("1", of("0-2"), dead, member("2", of("0-2")))
    assert verdict.acceptor.accepted == ids("0-1")


def test_who_is_left_out_is_told() -> None:
    with pytest.raises(Superseded, match="went on as generation 5"):
        outcome("2", of("0-2", 4), member("0", of("0-1", 5)))


def test_who_missed_an_answer_catches_up() -> None:
    verdict = outcome("2", of("0-2", 4), member("0", of("0-2", 5)), member("1", of("0-2", 5)))
    assert verdict == Verdict(of("0-2", 5, "0-2"), "again")


def test_a_new_worker_is_taken_in() -> None:
    new = member("2.1", AcceptorState())
    first = outcome("0", of("0-1"), member("1", of("0-1")), new)
    assert first.acceptor.accepted == ids("0-1,2.1")
    learned = advance(new, reports(member("0", of("0-1")), member("1", of("0-1")), new))
    assert learned == Verdict(of("0-1"), "again")
    second = outcome(
        "0", first.acceptor, member("1", first.acceptor), replace(new, acceptor=of("0-1"))
    )
    assert second == Verdict(of("0-1,2.1", 2), "agreed")


def test_a_second_process_for_a_rank_waits_while_the_first_takes_part() -> None:
    verdict = outcome("0", of("0-1"), member("1", of("0-1")), member("1.5", AcceptorState()))
    assert verdict.acceptor.accepted == ids("0-1")


def test_too_few_ranks_wait() -> None:
    verdict = outcome("0", of("0-1"), lost=ids("1"), min_ranks=2)
    assert verdict.reason == "1 ranks are left, elastic.min_ranks = 2"


@given(st.frozensets(identities, min_size=1), st.data())
def test_two_majorities_share_a_member(whole: frozenset[Identity], data: st.DataObject) -> None:
    some = data.draw(st.frozensets(st.sampled_from(sorted(whole))))
    assert not (is_majority(some, whole) and is_majority(whole - some, whole))


@given(st.data())
def test_no_order_of_events_splits_a_run(data: st.DataObject) -> None:
    """Rounds of several Lighthouses at once, with old reports and lost answers, deaths and
    newcomers."""
    size = data.draw(st.integers(1, 5))
    start = frozenset(Identity(rank) for rank in range(size))
    first = data.draw(st.sampled_from([AcceptorState(), AcceptorState(1, start)]))
    workers = {i: Report(i, first, world_size=size, founder=True) for i in start}
    sent: dict[Identity, list[Report]] = {i: [r] for i, r in workers.items()}
    chosen: dict[int, frozenset[Identity]] = {first.generation: first.members}
    returned: dict[int, Generation] = {}
    superseded: set[Identity] = set()
    replaced: set[Identity] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        event = data.draw(st.sampled_from(["round", "round", "round", "die", "join"]))
        some = data.draw(st.sampled_from(sorted(workers)))
        if event == "die":
            workers[some] = replace(workers[some], alive=False)
            sent[some].append(workers[some])
        elif event == "join" and not workers[some].alive and some not in replaced:
            replaced.add(some)
            new = Identity(
                some.rank, max(i.incarnation for i in workers if i.rank == some.rank) + 1
            )
            before = workers[some]
            founder = before.founder and before.acceptor == AcceptorState()
            if founder:
                superseded.add(some)  # no agent reports for a founder without a report
            workers[new] = Report(new, world_size=size, founder=founder)
            sent[new] = [workers[new]]
        elif event == "round":
            present = data.draw(st.frozensets(st.sampled_from(sorted(workers)), min_size=1))
            seen = {i: data.draw(st.sampled_from(sent[i][-3:])) for i in sorted(present)}
            if data.draw(st.booleans()):
                seen = {
                    i: replace(r, lost=frozenset(workers) - seen.keys()) for i, r in seen.items()
                }
            for identity in sorted(present - superseded):
                if not data.draw(st.integers(0, 3)):
                    continue  # the answer is lost on the way
                own = workers[identity]
                try:
                    verdict = advance(own, seen)
                except Superseded:
                    superseded.add(identity)
                    continue
                acceptor = verdict.acceptor
                assert acceptor.generation >= own.acceptor.generation
                if acceptor.generation == own.acceptor.generation and own.acceptor.accepted:
                    assert acceptor.accepted == own.acceptor.accepted
                assert chosen.setdefault(acceptor.generation, acceptor.members) == acceptor.members
                if verdict.outcome == "agreed":
                    assert identity in acceptor.members
                    if own.acceptor.generation < acceptor.generation:
                        value = generation_of(acceptor, seen)
                        assert (
                            returned.setdefault(value.number, value).identities == value.identities
                        )
                workers[identity] = replace(own, acceptor=acceptor)
                sent[identity].append(workers[identity])
