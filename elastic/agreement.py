"""The rule by which workers agree on their next generation. Pure: reports in, verdict out.

A round of a Lighthouse hands the same set of reports to all who take part in it. This module
decides what a worker makes of them, and is safe whatever a Lighthouse does: restart, forget, hand
out old reports, reach only some, or run twice. It rests on one fact: a member of generation g
accepts at most one membership for generation g + 1, ever, and that acceptance outlives its process
(its agent speaks on for it, see `AcceptorFile`). A membership is chosen once a majority of
generation g has accepted it; two majorities share a member, so at most one membership is ever
chosen for g + 1: there is no split brain. A side that holds no majority waits, and does not train.
(A write-once vote per slot: Paxos' acceptors without a second ballot number, Lamport 1998; the
chain of configurations as in Lamport, Malkhi and Zhou 2009.)

Usually two rounds are enough: in the first all accept, in the second all see that all did.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from holdfast.elastic.generation import (
    Generation,
    Identity,
    Member,
    format_identities,
    parse_identities,
    parse_identity,
)
from holdfast.parallel.errors import MembershipError, Superseded

Identities = frozenset[Identity]
_NO_IDENTITIES: Identities = frozenset()


@dataclass(frozen=True, slots=True)
class AcceptorState:
    """What a worker knows to be decided, and what it has accepted next. It only moves forward."""

    generation: int = 0
    """The newest generation that it knows to be chosen; 0: none."""
    members: Identities = _NO_IDENTITIES
    """Of that generation; empty for 0."""
    accepted: Identities = _NO_IDENTITIES
    """The membership that it has accepted for the generation after that; empty: none yet."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one worker tells the others in a round.

    One message, so that a worker tells all of it or nothing: hence its many fields.
    """

    identity: Identity
    acceptor: AcceptorState = AcceptorState()
    alive: bool = True
    """False: its process has ended, and its agent speaks for it."""
    founder: bool = False
    """It may take part in founding the first generation: the run was started with it, or it
    replaces a worker that was and had not voted."""
    world_size: int = 1
    """Ranks that the first generation needs, one founder each."""
    min_ranks: int = 1
    lost: Identities = _NO_IDENTITIES
    """Workers that are not waited for: their end, or their silence, has been noticed."""
    impatient: bool = False
    """It has waited long enough for those who are missing without anybody knowing why."""
    node: str = ""
    store: str = ""
    held: int = 0
    step: int = 0
    phase: str = ""
    leaving: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)


def report_to_data(report: Report) -> dict[str, Any]:
    """A report as JSON values."""
    plain = {name: getattr(report, name) for name in Report.__slots__}
    plain["identity"] = str(report.identity)
    plain["ballot"] = acceptor_to_data(plain.pop("acceptor"))
    plain["lost"] = format_identities(report.lost)
    return plain


def report_from_data(plain: Mapping[str, Any]) -> Report:
    """The report that `report_to_data` wrote.

    Raises:
        MembershipError: something else, such as what another version of holdfast wrote.
    """
    try:
        fields = dict(plain)
        fields["identity"] = parse_identity(fields["identity"])
        fields["acceptor"] = acceptor_from_data(fields.pop("ballot"))
        fields["lost"] = parse_identities(fields["lost"])
        return Report(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise MembershipError(
            f"a member reported what this version of holdfast does not understand ({error!r}); "
            "run the same version on all nodes"
        ) from error


def acceptor_to_data(acceptor: AcceptorState) -> list[Any]:
    """An acceptor state as JSON values."""
    members, accepted = format_identities(acceptor.members), format_identities(acceptor.accepted)
    return [acceptor.generation, members, accepted]


def acceptor_from_data(plain: list[Any]) -> AcceptorState:
    """The acceptor state that `acceptor_to_data` wrote."""
    generation, members, accepted = plain
    return AcceptorState(int(generation), parse_identities(members), parse_identities(accepted))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round means for one worker."""

    acceptor: AcceptorState
    outcome: Literal["agreed", "again", "wait"]
    """agreed: the new generation stands; again: take part in the next round at once; wait: in a
    later one, because a member is missing."""
    reason: str = ""
    """Why it waits, for a person."""
    minority: bool = False
    """It waits because too few members of the last generation take part."""


def is_majority(side: Collection[Identity], whole: Collection[Identity]) -> bool:
    """More than half of `whole`, or half of it with its lowest identity, the tie-breaker."""
    count = sum(identity in side for identity in whole)
    return 2 * count > len(whole) or (
        2 * count == len(whole) > 0 and min(whole) in side  # two halves cannot both hold it
    )


def advance(own: Report, reports: Mapping[Identity, Report]) -> Verdict:
    """What a round with these reports means for the worker that sent `own`.

    Args:
        reports: by identity; all that the round has, whether or not `own` (or an older one of the
            same worker) is among them.
    Raises:
        Superseded: generations have been chosen since, without this worker.
        MembershipError: members disagree on what was chosen, which the rule excludes.
    """
    acceptor = _newest(own, reports)
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


def generation_of(acceptor: AcceptorState, reports: Mapping[Identity, Report]) -> Generation:
    """The value that members return from the round in which they agreed."""
    members = (reports[identity] for identity in sorted(acceptor.members))
    return Generation(
        acceptor.generation,
        tuple(
            Member(r.identity, r.node, r.store, r.held, r.step, r.phase, r.leaving, dict(r.data))
            for r in members
        ),
    )


def _live(reports: Mapping[Identity, Report]) -> Identities:
    return frozenset(identity for identity, report in reports.items() if report.alive)


def _newest(own: Report, reports: Mapping[Identity, Report]) -> AcceptorState:
    """The worker's acceptor state, moved on to the newest generation that anybody knows."""
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
        raise Superseded(
            f"rank {own.identity.rank}: the run went on as generation {generation} with ranks "
            f"{format_identities(members)}, without this process; a new process takes its place"
        )
    return AcceptorState(generation, members)


def _chosen(acceptor: AcceptorState, accepted: Mapping[Identity, Identities]) -> Identities | None:
    """The membership of the next generation if these acceptances choose one."""
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
    """Accept a membership for the next generation where the rule allows one."""
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
    """The first generation has every rank that the run was started with, and needs all of them."""
    bound = {value for identity, value in accepted.items() if reports[identity].founder}
    if bound:
        return min(bound, key=sorted), ""
    founders = frozenset(i for i in _live(reports) if reports[i].founder)
    missing = set(range(own.world_size)) - {identity.rank for identity in founders}
    if missing:
        ranks = format_identities(Identity(rank) for rank in missing)
        return None, f"waiting for ranks {ranks} to start"
    return _newest_incarnations(founders, _NO_IDENTITIES), ""


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
    excused = frozenset[Identity]().union(*(report.lost for report in reports.values()))
    missing = acceptor.members - reports.keys() - excused
    if missing and not any(report.impatient for report in reports.values()):
        return None, f"waiting for ranks {format_identities(missing)}", False
    value = _newest_incarnations(_live(reports), acceptor.members)
    if len(value) < own.min_ranks:
        return None, f"{len(value)} ranks are left, elastic.min_ranks = {own.min_ranks}", False
    return value, "", False


def _newest_incarnations(live: Identities, members: Identities) -> Identities:
    """One worker per rank: the member, else the newest."""
    by_rank: dict[int, Identity] = {}
    for identity in sorted(live, key=lambda i: (i in members, i)):
        by_rank[identity.rank] = identity
    return frozenset(by_rank.values())


def _too_few(present: Collection[Identity], acceptor: AcceptorState) -> str:
    return (
        f"ranks {format_identities(present) or 'none'} take part, which is no majority of "
        f"generation {acceptor.generation} (ranks {format_identities(acceptor.members)})"
    )
