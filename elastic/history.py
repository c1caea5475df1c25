"""The membership changes of a run in its events.jsonl: their lines, and the history in them. Pure.

Every worker hears every membership event, and every member of a generation has the same value of
it. So one member, the recorder, writes the lines for all, and agents write none. No member can know
the end of all workers; the agents' exit codes tell it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.elastic.faults import Fault, fault_from_data
from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.errors import ConfigError, shown
from holdfast.parallel.reading import MALFORMED, Count, of_kind

CHANGES = ("generation", "recovered")
"""The events that each tell of one change."""


@dataclass(frozen=True, slots=True)
class RecordedChange:
    """One change, as it came into force."""

    step: Count
    """The number of steps committed at that time."""
    within_step: bool
    """Whether it interrupted a step."""
    committed: bool
    """Whether the interrupted step was committed by the change."""
    lost: tuple[int, ...]
    leaving: tuple[int, ...]
    joined: tuple[int, ...]
    plan: Mapping[str, Any]
    filled: bool = True
    """Whether all state that was incoming under the plan before had arrived."""
    slowness: tuple[tuple[int, int], ...] = ()
    """The slow ranks that it knew of, as of `Plan.slowness`."""

    @property
    def after(self) -> int:
        """The number of steps committed at the last undisturbed moment before the change."""
        return self.step if self.within_step and not self.committed else self.step - 1


@dataclass(frozen=True, slots=True)
class MembershipHistory:
    """One start of a run, from its first generation on."""

    first_step: int
    """The number of steps committed at the start: that of the loaded checkpoint, or 0."""
    nodes: Mapping[str, tuple[int, ...]]
    """The ranks that each node has had."""
    changes: tuple[RecordedChange, ...]
    last_step: int | None
    """The step after which it went back to a checkpoint, so that the rest is not repeated; None: it
    never did."""
    faults: tuple[Fault, ...]
    """The faults that lead a new run through the same losses: kills, and bits flipped on
    purpose."""
    machines: Mapping[str, str] = field(default_factory=dict)
    """The machine of each node, where it is recorded."""

    def awaited(self, committed: int) -> frozenset[int]:
        """The ranks that must be ready to join before the step after `committed` begins."""
        return frozenset(
            rank for change in self.changes if change.after == committed for rank in change.joined
        )

    def slowness_after(self, step: int) -> tuple[tuple[int, int], ...]:
        """The slow ranks that the first change after `step` committed steps knew of."""
        for change in self.changes:
            if change.step >= step:
                return change.slowness
        return ()

    def changes_after(self, step: int) -> bool:
        """Whether the ranks change, undisturbed, once `step` is committed."""
        return any(c.step == step and not c.within_step for c in self.changes)

    def filled_after(self, step: int) -> bool:
        """Whether the vote of `step` said that all incoming state had arrived."""
        return any(
            c.filled and c.step == step and (c.committed or not c.within_step) for c in self.changes
        )

    def leaves_after(self, rank: int, step: int) -> bool:
        """Whether a rank hands its state over once `step` is committed."""
        return any(c.step == step and not c.within_step and rank in c.leaving for c in self.changes)

    def may_start(self, rank: int, incarnation: int, committed: int, *, founder: bool) -> bool:
        """Whether a worker may start, so that it joins no sooner than the worker it repeats."""
        joins = [c for c in self.changes if rank in c.joined]
        number = incarnation - (1 if founder else 0)
        if number < 0:
            return True
        return number < len(joins) and committed >= joins[number].after


def newest_start(events: Sequence[Mapping[str, Any]]) -> int | None:
    """The index of the change that began a run's newest start; None if the run was not elastic."""
    starts = [n for n, e in enumerate(events) if e["event"] in CHANGES and e.get("generation") == 1]
    return starts[-1] if starts else None


def history_of(events: Sequence[Mapping[str, Any]]) -> MembershipHistory:
    """The history of a run's newest start, from the lines of its events.jsonl.

    Raises:
        ConfigError: the run's events have no changes, or ones that no run has written.
    """
    begun = newest_start(events)
    if begun is None:
        raise ConfigError("this run was not an elastic one; there are no changes to repeat")
    try:
        return _history(events, begun)
    except MALFORMED as error:
        what = shown(f"{type(error).__name__}: {error}")
        raise ConfigError(
            f"an event in events.jsonl is not as a run writes it ({what}), so the changes of ranks "
            "cannot be repeated"
        ) from error


def _history(events: Sequence[Mapping[str, Any]], begun: int) -> MembershipHistory:
    first = events[begun]
    found = [e for e in events[begun + 1 :] if e["event"] in CHANGES]
    back = next((n for n, e in enumerate(found) if e["from_checkpoint"] is not None), len(found))
    changes = tuple(map(_change, found[:back]))
    placed = {
        rank for e in (first, *events[begun + 1 :]) if "plan" in e for rank in _ranks(e["plan"])
    }
    started = [e for e in events if e["event"] == "worker_started" and e["rank"] in placed]
    node_of = {e["rank"]: e["node"] for e in started}
    nodes: dict[str, tuple[int, ...]] = {}
    for rank in sorted(node_of):
        nodes[node_of[rank]] = (*nodes.get(node_of[rank], ()), rank)
    founders = set(_ranks(first["plan"]))
    flipped = (e for e in events[begun + 1 :] if e.get("fault") == "corrupt-memory")
    return MembershipHistory(
        first_step=of_kind([first["from_checkpoint"] or 0], list[Count])[0],
        nodes=nodes,
        changes=changes,
        last_step=max((c.after + 1 for c in changes), default=0) if back < len(found) else None,
        faults=(*_kills(changes, founders), *map(_repeated, flipped)),
        machines={e["node"]: e["machine"] for e in started if "machine" in e},
    )


def _change(event: Mapping[str, Any]) -> RecordedChange:
    names = ("step", "within_step", "committed", "lost", "leaving", "joined", "plan", "filled")
    found = {name: event[name] for name in names} | {"slowness": event.get("slowness", ())}
    return of_kind(found, RecordedChange)


def _ranks(plan: Mapping[str, Any]) -> list[int]:
    ranks = [r for stage in plan["stages"] for replica in stage for r in replica]
    return of_kind([*ranks, *plan["spares"]], list[Count])


def _kills(changes: Iterable[RecordedChange], founders: set[int]) -> Iterable[Fault]:
    """A SIGKILL for each loss: before the vote of the step that it interrupted, or after it."""
    process = dict.fromkeys(founders, 0)
    for change in changes:
        for rank in change.lost:
            undecided = change.within_step and not change.committed
            step, phase = (change.step + 1, "reduce") if undecided else (change.step, "apply")
            yield Fault("kill", rank, step, phase, incarnation=process.get(rank, 0))
        for rank in change.joined:
            process[rank] = process[rank] + 1 if rank in process else 0


def _repeated(event: Mapping[str, Any]) -> Fault:
    names = Fault.__slots__
    return fault_from_data({name: event[name] for name in names})


@dataclass(frozen=True, slots=True)
class RunEvent:
    """A line of events.jsonl, without its time."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


def change_events(
    before: Generation | None, after: Generation, heard: Iterable[MembershipEvent]
) -> list[RunEvent]:
    """The events `rank_lost`, `rank_left` and `rank_joined` of a change, by rank. Pure.

    Args:
        before: the writer's last generation; None for its first, which has no such events.
        heard: the membership events that the writer has heard (`Membership.drain_events`), which
            give the causes.
    Returns:
        `rank_lost` has the fields rank, incarnation, node, cause, and detected_s: seconds between
        the rank's last sign of life and the event of its loss; null if that is not known.
        `rank_left`, of one that was let go, has rank, incarnation and node; `rank_joined` has
        generation too.
    """
    if before is None:
        return []
    losses: dict[Identity, MembershipEvent] = {}
    for event in heard:
        known = losses.get(event.identity)
        if event.lost and (known is None or _tells(event) > _tells(known)):
            losses[event.identity] = event
    events: list[tuple[Identity, RunEvent]] = []
    for identity in after.lost_since(before):
        loss = losses.get(identity)
        member = next(m for m in before.members if m.identity == identity)
        if member.leaving:  # its state went to others before
            events.append((identity, RunEvent("rank_left", _who(identity, member.node))))
            continue
        cause = loss.cause if loss is not None else "did not answer"
        fields = {
            **_who(identity, member.node),
            "cause": cause,
            "detected_s": (loss.age_s or None) if loss is not None else None,
        }
        events.append((identity, RunEvent("rank_lost", fields)))
    for identity in after.joined_since(before):
        node = after.member(identity.rank).node
        fields = {**_who(identity, node), "generation": after.number}
        events.append((identity, RunEvent("rank_joined", fields)))
    return [event for _, event in sorted(events, key=lambda e: (e[0].rank, e[0].incarnation))]


def _tells(event: MembershipEvent) -> tuple[bool, bool]:
    """How much the event of a loss tells: the end of the process, and how soon it was noticed."""
    return event.kind == "ended", event.age_s > 0


def _who(identity: Identity, node: str) -> dict[str, Any]:
    return {"rank": identity.rank, "incarnation": identity.incarnation, "node": node}
