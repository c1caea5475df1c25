"""The statuses that workers report when they agree, and the recovery plan from them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from holdfast.elastic import Generation
from holdfast.parallel.errors import MembershipError, shown
from holdfast.parallel.reading import MALFORMED, Count, of_kind
from holdfast.trainer.config import Removal
from holdfast.trainer.step import (
    UNKNOWN_MEMORY,
    DeviceMemory,
    Included,
    Outcome,
    RankInputs,
    included_from_data,
    included_to_data,
    inputs_from_data,
    inputs_to_data,
)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The status of one worker: its progress, and the state it can continue from.

    It is one message because ranks conclude from all of it at once.
    """

    active: Count = 0
    """The generation of the plan in force here; 0: it has no state."""
    prepared: Count = 0
    """The generation of the plan that can be activated here, because its state is complete."""
    decided: Count = 0
    """The number of steps whose vote has a result here."""
    updated: Count = 0
    """The number of steps whose update its own blocks have had."""
    updates: Count = 0
    """The updates of the optimizer among them: skipped steps have none."""
    complete: bool = True
    """Whether it has all parameters after these updates."""
    filled: bool = True
    """Whether it knows by a vote that all state incoming under its plan has arrived."""
    outcome: Outcome | None = None
    """The outcome of the last vote."""
    included: Included = field(default_factory=dict)
    """The micro-batches that its sums include of the step after the last decided one."""
    inputs: RankInputs = field(default_factory=dict)
    """What it has kept of that step's inputs of experts."""
    operations: Sequence[str] = ()
    """Its last operations, for a reader of the incident."""
    connected: bool = True
    """Whether its connections are intact and idle."""
    memory: DeviceMemory = UNKNOWN_MEMORY
    rewinds: Count = 0
    """How often it has gone back to an earlier step."""
    removals: tuple[Removal, ...] = ()
    """The samples that it trains without."""
    trusted: bool = True
    """False: state was found to be corrupt, and no rank's state is used."""


_KEYS = {"active": "installed", "prepared": "ready", "included": "counted"}
"""The fields that have another key in messages and incident records."""


def status_to_data(status: WorkerStatus) -> dict[str, Any]:
    """The status as JSON values; floats keep all their bits."""
    plain = {_KEYS.get(name, name): getattr(status, name) for name in WorkerStatus.__slots__}
    plain["counted"] = included_to_data(status.included)
    plain["inputs"] = inputs_to_data(status.inputs)
    plain["removals"] = msgspec.to_builtins(status.removals)
    outcome = status.outcome
    if outcome is not None:
        plain["outcome"] = asdict(outcome) | {
            "loss": outcome.loss.hex(),
            "grad_norm": outcome.grad_norm.hex(),
        }
    return plain


def status_from_data(plain: Mapping[str, Any]) -> WorkerStatus:
    """The status that `status_to_data` wrote.

    Raises:
        MembershipError: it is none, for example one of another version of holdfast.
    """
    try:
        fields = dict(plain) | {name: plain[key] for name, key in _KEYS.items()}
        fields["included"] = included_from_data(fields["included"])
        fields["inputs"] = inputs_from_data(fields["inputs"])
        outcome = fields.get("outcome")
        if outcome is not None:
            numbers = {key: float.fromhex(outcome[key]) for key in ("loss", "grad_norm")}
            fields["outcome"] = of_kind({**outcome, **numbers}, Outcome)
        return of_kind(fields, WorkerStatus)
    except MALFORMED as error:
        raise MembershipError(
            f"a worker has a status that this version of holdfast does not understand "
            f"({shown(error)}); run the same version on all nodes"
        ) from error


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """The conclusion of all members from their statuses.

    It is one value because every field follows from all statuses.
    """

    active: int
    """The newest plan that is active anywhere, by its generation; 0: no rank has state."""
    holders: tuple[int, ...]
    """The ranks that have, or can at once have, the state of that plan."""
    staying: tuple[int, ...]
    """The ranks that are in the next plan."""
    steps: int = 0
    """The number of steps that every holder must finish: some member has the last one's vote."""
    updates: int = 0
    """The updates of the optimizer after these steps."""
    outcome: Outcome | None = None
    """The outcome of the last of these steps."""
    complete: bool = True
    """Whether all holders have all parameters."""
    filled: bool = True
    """Whether the state incoming under the plan has arrived; otherwise it does not count as
    state."""
    fresh: frozenset[int] = field(default=frozenset())
    """The members without state."""
    connected: bool = False
    """Whether the connections of all members are intact."""
    rewinds: int = 0
    """How often the run has gone back: a holder that has not done so as often does now."""
    removals: tuple[Removal, ...] = ()
    """The samples that the run trains without."""
    rank_bytes: int = 0
    """The memory that any member has at least; 0: not known."""
    included: Mapping[int, Included] = field(default_factory=dict)
    """By holder, the micro-batches that its sums include of the next step."""
    inputs: Mapping[int, RankInputs] = field(default_factory=dict)
    """By holder of `included`, what it has kept of that step's inputs of experts."""

    @property
    def repeats_step(self) -> bool:
        """Whether the step after these is repeated if it was interrupted.

        Otherwise the last of these steps was: it was committed, but its parameters had not arrived,
        and no holder had begun the next.
        """
        return self.complete or bool(self.included)


def plan_recovery(generation: Generation) -> RecoveryPlan:
    """The plan and the step to recover; equal on every member.

    A plan that any member has activated was complete on all of its ranks. A step is committed if
    any member has the result of its vote, and then all can finish it.
    """
    statuses = {m.rank: status_from_data(m.data) for m in generation.members}
    staying = tuple(m.rank for m in generation.members if not m.leaving)
    active = max(status.active for status in statuses.values())
    everyone = frozenset(statuses)
    if not active or not all(status.trusted for status in statuses.values()):
        return RecoveryPlan(0, (), staying, fresh=everyone)
    holders = {r: s for r, s in statuses.items() if active in (s.active, s.prepared)}
    furthest = max(holders.values(), key=lambda s: (s.rewinds, s.decided, s.updated))
    course = furthest.rewinds, furthest.decided
    outcome = furthest.outcome
    behind = furthest.updated < furthest.decided
    in_step = {
        rank: s
        for rank, s in sorted(holders.items())
        if s.included and (s.rewinds, s.decided) == course
    }
    return RecoveryPlan(
        active=active,
        holders=tuple(sorted(holders)),
        staying=staying,
        steps=furthest.decided,
        updates=furthest.updates + bool(behind and outcome is not None and outcome.usable),
        outcome=outcome,
        complete=all(s.complete and (s.rewinds, s.updated) == course for s in holders.values()),
        # A rank that has only prepared the plan knows of no vote under it.
        filled=any(s.filled for s in holders.values() if s.active == active),
        fresh=everyone - holders.keys(),
        connected=all(status.connected for status in statuses.values()),
        rewinds=furthest.rewinds,
        removals=furthest.removals,
        rank_bytes=_least_memory(generation, statuses),
        included={rank: s.included for rank, s in in_step.items()},
        inputs={rank: s.inputs for rank, s in in_step.items() if s.inputs},
    )


def _least_memory(generation: Generation, statuses: Mapping[int, WorkerStatus]) -> int:
    """The least memory of a member, where those of a machine share it."""
    on_machine = Counter(member.machine for member in generation.members)
    found = (
        memory.bytes // (on_machine[member.machine] if memory.is_shared else 1)
        for member in generation.members
        if (memory := statuses[member.rank].memory).bytes
    )
    return min(found, default=0)
