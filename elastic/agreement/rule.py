"""The rule by which workers agree on their next generation. Pure: reports in, verdict out.

A round of a Lighthouse hands the same set of reports to all participants. This module decides what
a worker concludes from them. The rule is safe whatever a Lighthouse does: restart, forget, hand out
old reports, reach only some workers, or run twice.

It rests on one fact: a member of generation g accepts at most one membership for generation g + 1,
ever, and that acceptance outlives its process (its agent reports it on, see `AcceptorFile`). A
membership is chosen once a majority of generation g has accepted it. Two majorities share a member,
so at most one membership is ever chosen for g + 1, and a run never splits. A side without a
majority waits and does not train. (These are Paxos' acceptors without a second ballot number,
Lamport 1998; the chain of configurations is as in Lamport, Malkhi and Zhou 2009.)

Two rounds are usually enough: in the first all accept, in the second all see that all did. The
answer of the second may be lost on its way to some. So those that have it go on to take part in
rounds, as settled, until all are known to have it: one of them tells the others the value. A member
that cannot leave its step at once takes part as settled too, so that it is not taken for missing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.elastic.agreement.answers import misses_answer
from holdfast.elastic.agreement.reports import NO_IDENTITIES, AcceptorState, Identities, Report
from holdfast.elastic.generation import Generation, Identity, format_identities
from holdfast.parallel.errors import MembershipError, Superseded


class PassedOver(Superseded):
    """A generation was chosen without a worker of the last one."""

    def __init__(self, identity: Identity, chosen: AcceptorState) -> None:
        super().__init__(
            f"rank {identity.rank}: the run went on as generation {chosen.generation} with ranks "
            f"{format_identities(chosen.members)}, without this process; a new process takes its "
            "place"
        )
        self.chosen = chosen


@dataclass(frozen=True, slots=True)
class Verdict:
    """The conclusion of one worker from a round."""

    acceptor: AcceptorState
    outcome: Literal["agreed", "again", "wait"]
    """"agreed": the new generation stands. "again": take part in the next round at once. "wait": a
    member is missing; take part in a later round."""
    reason: str = ""
    """The reason to wait, for a person."""
    minority: bool = False
    """Whether it waits because too few members of the last generation take part."""
    learnt: Generation | None = None
    """The generation that was agreed on in an earlier round, of which a settled worker told."""


def is_majority(side: Collection[Identity], whole: Collection[Identity]) -> bool:
    """Whether `side` is more than half of `whole`, or half of it with its lowest identity."""
    count = sum(identity in side for identity in whole)
    return 2 * count > len(whole) or (
        2 * count == len(whole) > 0 and min(whole) in side  # two halves cannot both hold it
    )


def advance(own: Report, reports: Mapping[Identity, Report]) -> Verdict:
    """The verdict of a round for the worker that sent `own`.

    Args:
        reports: all reports of the round by identity, with or without `own` (or an older one of the
            same worker).
    Raises:
        Superseded: later generations were chosen without this worker.
        MembershipError: members disagree on the chosen membership, which the rule excludes.
    """
    acceptor = _newest(own, reports)
    if (learnt := _learn(own, reports)) is not None:
        return learnt
    reports = {identity: report for identity, report in reports.items() if not report.settled}
    while True:
        accepted = {
            identity: report.acceptor.accepted
            for identity, report in reports.items()
            if report.acceptor.generation == acceptor.generation and report.acceptor.accepted
        }
        chosen = _chosen(acceptor, accepted)
        if chosen is None:
            return _accept(own, acceptor, reports, accepted)
        decided_by = (chosen & acceptor.members) or chosen
        agreed = chosen <= _live(reports) and all(accepted.get(i) == chosen for i in decided_by)
        acceptor = _moved(own, acceptor, acceptor.generation + 1, chosen)
        if agreed and own.identity in chosen:
            return Verdict(acceptor, "agreed")


def _learn(own: Report, reports: Mapping[Identity, Report]) -> Verdict | None:
    """The verdict of a worker that missed an answer, if settled workers show that it did."""
    settled = [report for report in reports.values() if report.settled]
    newest = max((r.acceptor for r in settled), key=lambda a: a.generation, default=own.acceptor)
    number, members = newest.generation, newest.members
    if not settled or not own.alive or number <= own.held or number < own.acceptor.generation:
        return None
    if own.identity not in members:
        return Verdict(own.acceptor, "wait", f"generation {number} begins, without this worker yet")
    for report in settled:
        told = report.told
        if told is not None and (told.number, told.identities) == (number, members):
            if misses_answer(own, told):
                return Verdict(AcceptorState(number, members), "agreed", learnt=told)
            return None
    if own.acceptor.generation == number and own.acceptor.accepted:
        return None
    return Verdict(own.acceptor, "wait", f"generation {number} is agreed on, and not told here yet")


def _live(reports: Mapping[Identity, Report]) -> Identities:
    return frozenset(identity for identity, report in reports.items() if report.alive)


def _newest(own: Report, reports: Mapping[Identity, Report]) -> AcceptorState:
    """The worker's acceptor state, advanced to the newest generation that any report has."""
    newest = max(
        (r.acceptor for r in reports.values()), key=lambda b: b.generation, default=own.acceptor
    )
    if newest.generation < own.acceptor.generation:
        newest = own.acceptor
    for report in (own, *reports.values()):
        known = report.acceptor
        if known.generation == newest.generation and known.members != newest.members:
            raise MembershipError(
                f"two memberships are held to be generation {newest.generation}: "
                f"{format_identities(newest.members)} and {format_identities(known.members)}; "
                "stop all workers and resume from the newest checkpoint"
            )
    if newest.generation == own.acceptor.generation:
        return own.acceptor
    return _moved(own, own.acceptor, newest.generation, newest.members)


def _moved(
    own: Report, acceptor: AcceptorState, generation: int, members: Identities
) -> AcceptorState:
    """The acceptor state of a worker that learns of a generation."""
    if own.identity in acceptor.members and own.identity not in members:
        raise PassedOver(own.identity, AcceptorState(generation, members))
    return AcceptorState(generation, members)


def _chosen(acceptor: AcceptorState, accepted: Mapping[Identity, Identities]) -> Identities | None:
    """The membership of the next generation, if these acceptances choose one."""
    for value in set(accepted.values()):
        supporters = {identity for identity, own in accepted.items() if own == value}
        if acceptor.generation == 0:
            if supporters >= value:
                return value
        elif is_majority(supporters, acceptor.members):
            return value
    return None


def _accept(
    own: Report,
    acceptor: AcceptorState,
    reports: Mapping[Identity, Report],
    accepted: Mapping[Identity, Identities],
) -> Verdict:
    """Accept a membership for the next generation if the rule allows one."""
    if acceptor.generation == 0:
        if acceptor.accepted:
            return Verdict(acceptor, "wait", "not every rank has accepted the first generation yet")
        value, reason = _first(own, reports, accepted)
        minority = False
    elif acceptor.accepted:
        return Verdict(acceptor, *_wait_for_reports(acceptor, reports))
    else:
        value, reason, minority = _next(own, acceptor, reports, accepted)
    if value is None:
        return Verdict(acceptor, "wait", reason, minority)
    if own.identity not in (acceptor.members or value):
        return Verdict(acceptor, "again")
    return Verdict(replace(acceptor, accepted=value), "again")


def _wait_for_reports(
    acceptor: AcceptorState, reports: Mapping[Identity, Report]
) -> tuple[Literal["wait"], str, bool]:
    present = acceptor.members & reports.keys()
    minority = not is_majority(present, acceptor.members)
    if minority:
        return "wait", _too_few(present, acceptor), True
    return (
        "wait",
        f"generation {acceptor.generation + 1} is not decided: ranks "
        f"{format_identities(acceptor.accepted)} were accepted here, and not by a majority yet",
        False,
    )


def _first(
    own: Report, reports: Mapping[Identity, Report], accepted: Mapping[Identity, Identities]
) -> tuple[Identities | None, str]:
    """The membership of the first generation: every rank that the run was started with.

    All of them are needed.
    """
    bound = {value for identity, value in accepted.items() if reports[identity].founder}
    if bound:
        return min(bound, key=sorted), ""
    founders = frozenset(i for i in _live(reports) if reports[i].founder)
    missing = set(range(own.world_size)) - {identity.rank for identity in founders}
    if missing:
        ranks = format_identities(Identity(rank) for rank in missing)
        return None, f"waiting for ranks {ranks} to start"
    return _newest_incarnations(founders, NO_IDENTITIES), ""


def _next(
    own: Report,
    acceptor: AcceptorState,
    reports: Mapping[Identity, Report],
    accepted: Mapping[Identity, Identities],
) -> tuple[Identities | None, str, bool]:
    reported = acceptor.members & reports.keys()
    if not is_majority(reported, acceptor.members):
        return None, _too_few(reported, acceptor), True
    bound = {value for identity, value in accepted.items() if identity in acceptor.members}
    if bound:
        return min(bound, key=sorted), "", False
    # Only members say who is lost: a newcomer, or one that was left out, has waited for other
    # things, and members that train are late by a moment.
    heard = [reports[identity] for identity in reported]
    excused = frozenset[Identity]().union(*(report.lost for report in heard))
    missing = acceptor.members - reported - excused
    if missing:
        return None, f"waiting for ranks {format_identities(missing)}", False
    left_out = {
        identity
        for identity, report in reports.items()
        if identity in report.acceptor.members and identity not in acceptor.members
    }  # such a worker learns of that in this round, and ends
    value = _newest_incarnations(_live(reports) - left_out, acceptor.members)
    if len(value) < own.min_ranks:
        return None, f"{len(value)} ranks are left, elastic.min_ranks = {own.min_ranks}", False
    return value, "", False


def _newest_incarnations(live: Identities, members: Identities) -> Identities:
    """One worker per rank: the member, or else the newest incarnation."""
    by_rank: dict[int, Identity] = {}
    for identity in sorted(live, key=lambda i: (i in members, i)):
        by_rank[identity.rank] = identity
    return frozenset(by_rank.values())


def _too_few(present: Collection[Identity], acceptor: AcceptorState) -> str:
    return (
        f"ranks {format_identities(present) or 'none'} take part, which is no majority of "
        f"generation {acceptor.generation} (ranks {format_identities(acceptor.members)})"
    )
