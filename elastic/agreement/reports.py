"""What workers tell each other in the rounds of an agreement, and the proofs that it is theirs.

Pure.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.elastic.generation import (
    Generation,
    Identity,
    format_identities,
    generation_from_data,
    parse_identities,
    parse_identity,
)
from holdfast.parallel.errors import MembershipError, shown
from holdfast.parallel.reading import MALFORMED, Count, Text, of_kind

Identities = frozenset[Identity]
NO_IDENTITIES: Identities = frozenset()


@dataclass(frozen=True, slots=True)
class AcceptorState:
    """The knowledge of a worker: the chosen generation, and the next one it has accepted.

    It only moves forward.
    """

    generation: Count = 0
    """The newest generation that it knows to be chosen; 0: none."""
    members: Identities = NO_IDENTITIES
    """The members of that generation; empty for 0."""
    accepted: Identities = NO_IDENTITIES
    """The membership that it has accepted for the next generation; empty: none yet."""


@dataclass(frozen=True, slots=True)
class Report:
    """The report of one worker to the others in a round.

    All of it is one message, so that a worker tells all of it or nothing: hence its many fields.
    """

    identity: Identity
    acceptor: AcceptorState = AcceptorState()
    alive: bool = True
    """False: its process has ended, and its agent reports for it."""
    founder: bool = False
    """Whether it may take part in founding the first generation: the run was started with it, or it
    replaces such a worker that had not reported."""
    world_size: Count = 1
    """The number of ranks that the first generation needs, one founder each."""
    min_ranks: Count = 1
    """The least number of ranks that a generation may have."""
    lost: Identities = NO_IDENTITIES
    """Workers that are not waited for: their end or silence has been noticed, or they have been
    missing for too long. Counts among the members of a generation."""
    node: Text = ""
    """Its node."""
    machine: Text = ""
    """The identity of its machine."""
    store: Text = ""
    """The rendezvous store of its agent, HOST:PORT."""
    held: Count = 0
    """The generation of its training state; 0: it has none."""
    step: Count = 0
    """The number of steps that it has committed."""
    phase: Text = ""
    """The phase of the step that it was in."""
    leaving: bool = False
    """Whether it hands its state over and leaves."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Other values of the caller, as JSON values."""
    settled: bool = False
    """Whether it is at work in its acceptor's generation, and says so in rounds meanwhile."""
    told: Generation | None = None
    """That generation, told by one settled worker to those that missed the answer."""


def report_to_data(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    plain = {name: getattr(report, name) for name in Report.__slots__}
    plain["identity"] = str(report.identity)
    plain["ballot"] = acceptor_to_data(plain.pop("acceptor"))
    plain["lost"] = format_identities(report.lost)
    plain["told"] = report.told and report.told.to_data()
    return plain


def report_from_data(plain: Mapping[str, Any]) -> Report:
    """The report that `report_to_data` wrote.

    Raises:
        MembershipError: the values are not a report, for example one of another version of
            holdfast.
    """
    try:
        fields = dict(plain)
        fields["identity"] = parse_identity(fields["identity"])
        fields["acceptor"] = acceptor_from_data(fields.pop("ballot"))
        fields["lost"] = parse_identities(fields["lost"])
        fields["told"] = fields["told"] and generation_from_data(fields["told"])
        if unknown := fields.keys() - set(Report.__slots__):
            raise ValueError(f"unknown: {sorted(unknown)}")
        return of_kind(fields, Report)
    except MALFORMED as error:
        raise MembershipError(
            f"a member reported what this version of holdfast does not understand "
            f"({shown(error)}); "
            "run the same version on all nodes"
        ) from error


def acceptor_to_data(acceptor: AcceptorState) -> list[Any]:
    """The acceptor state as JSON values."""
    members, accepted = format_identities(acceptor.members), format_identities(acceptor.accepted)
    return [acceptor.generation, members, accepted]


def acceptor_from_data(plain: list[Any]) -> AcceptorState:
    """The acceptor state that `acceptor_to_data` wrote.

    Raises:
        ValueError, MembershipError: it is none.
    """
    generation, members, accepted = of_kind(plain, tuple[Count, str, str])
    return AcceptorState(generation, parse_identities(members), parse_identities(accepted))


def sealed_report(report: Report, replica: str, key: bytes) -> dict[str, Any]:
    """The report as JSON values, with a proof that a holder of the key made it for this replica."""
    text = json.dumps(report_to_data(report))
    return {"report": text, "proof": _proof(text, replica, key)}


def opened_report(data: Mapping[str, Any], replica: str, key: bytes) -> Report | None:
    """The report in `sealed_report`'s values; None: its proof is wrong or missing.

    Raises:
        MembershipError: the report is of another version of holdfast.
    """
    text, proof = data.get("report"), data.get("proof")
    if not isinstance(text, str) or not isinstance(proof, str):
        return None
    if not hmac.compare_digest(_proof(text, replica, key).encode(), proof.encode()):
        return None
    return report_from_data(json.loads(text))


def _proof(text: str, replica: str, key: bytes) -> str:
    return hmac.digest(key, f"{replica} {text}".encode(), "sha256").hex()
