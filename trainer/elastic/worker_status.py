"""The statuses that workers report when they agree, and what follows from them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from holdfast.elastic import Generation
from holdfast.trainer.step import Included, Outcome, Requests, included_from_data, included_to_data


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The status of one worker: how far it is, and what it can go on from."""

    active: int = 0
    """The generation whose plan is in force here; 0: it has no state."""
    prepared: int = 0
    """The generation whose plan could be put in force here: its state is complete."""
    decided: int = 0
    """Steps whose vote it has come out of."""
    updated: int = 0
    """Steps whose update its own blocks have had."""
    updates: int = 0
    """Updates of the optimizer among them: steps that were skipped have none."""
    complete: bool = True
    """Whether it has all parameters as they are after these."""
    filled: bool = True
    """Whether it knows by a vote that no rank lacks anything that was incoming under its plan."""
    outcome: Outcome | None = None
    """Of the last vote."""
    included: Included = field(default_factory=dict)
    """What its sums hold of the step after the last that was decided."""
    operations: Sequence[str] = ()
    """Its last operations, for a person who reads the incident."""
    connected: bool = True
    """Whether its connections stand, and carry nothing."""
    trusted: bool = True
    """False: state was found to be corrupt, and no rank's is used."""


_KEYS = {"active": "installed", "prepared": "ready", "included": "counted"}
"""Fields whose key in messages and incident records is another word."""


def status_to_data(status: WorkerStatus) -> dict[str, Any]:
    """A status as JSON values; floats keep all their bits."""
    plain = {_KEYS.get(name, name): getattr(status, name) for name in WorkerStatus.__slots__}
    plain["counted"] = included_to_data(status.included)
    outcome = status.outcome
    if outcome is not None:
        plain["outcome"] = asdict(outcome) | {
            "loss": outcome.loss.hex(),
            "grad_norm": outcome.grad_norm.hex(),
        }
    return plain


def status_from_data(plain: Mapping[str, Any]) -> WorkerStatus:
    """The status that `status_to_data` wrote."""
    fields = dict(plain) | {name: plain[key] for name, key in _KEYS.items()}
    for key in _KEYS.values():
        del fields[key]
    fields["included"] = included_from_data(fields["included"])
    outcome = fields.get("outcome")
    if outcome is not None:
        fields["outcome"] = Outcome(
            loss=float.fromhex(outcome["loss"]),
            grad_norm=float.fromhex(outcome["grad_norm"]),
            nonfinite_ranks=outcome["nonfinite_ranks"],
            out_of_range_ranks=outcome["out_of_range_ranks"],
            requests=Requests(**outcome["requests"]),
            leaving_ranks=outcome["leaving_ranks"],
        )
    return WorkerStatus(**fields)


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """What all members conclude from each other's statuses."""

    active: int
    """The newest plan that is active anywhere; 0: no rank has state."""
    holders: tuple[int, ...]
    """Ranks that have, or can at once have, the state of that plan."""
    staying: tuple[int, ...]
    """Ranks that get places."""
    steps: int = 0
    """That every holder must have had: some member has come out of the vote of the last."""
    updates: int = 0
    """Of the optimizer, after these steps."""
    outcome: Outcome | None = None
    """Of the last of these."""
    complete: bool = True
    """Whether all holders have all parameters."""
    filled: bool = True
    """Whether what was incoming under the plan is there; else it does not count as state."""
    fresh: frozenset[int] = field(default=frozenset())
    """Members without state."""
    connected: bool = False
    """Whether the connections of all members stand."""
    included: Mapping[int, Included] = field(default_factory=dict)
    """By holder, what its sums hold of the step to come."""


def plan_recovery(generation: Generation) -> RecoveryPlan:
    """The plan and the step to recover; equal on every member.

    A plan that any member has put in force was complete on all of its ranks; a step whose vote any
    member has come out of can be finished by all (DESIGN: a step is a transaction).
    """
    statuses = {m.rank: status_from_data(m.data) for m in generation.members}
    staying = tuple(m.rank for m in generation.members if not m.leaving)
    active = max(status.active for status in statuses.values())
    everyone = frozenset(statuses)
    if not active or not all(status.trusted for status in statuses.values()):
        return RecoveryPlan(0, (), staying, fresh=everyone)
    holders = {r: s for r, s in statuses.items() if active in (s.active, s.prepared)}
    furthest = max(holders.values(), key=lambda s: (s.decided, s.updated))
    outcome = furthest.outcome
    behind = furthest.updated < furthest.decided
    return RecoveryPlan(
        active=active,
        holders=tuple(sorted(holders)),
        staying=staying,
        steps=furthest.decided,
        updates=furthest.updates + bool(behind and outcome is not None and outcome.usable),
        outcome=outcome,
        complete=all(s.complete and s.updated == furthest.decided for s in holders.values()),
        # A rank that has only made prepared for the plan knows of no vote under it.
        filled=any(s.filled for s in holders.values() if s.active == active),
        fresh=everyone - holders.keys(),
        connected=all(status.connected for status in statuses.values()),
        included={
            rank: s.included
            for rank, s in sorted(holders.items())
            if s.included and s.decided == furthest.decided
        },
    )
