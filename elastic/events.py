"""The lines of events.jsonl for a change of generation. Pure.

Every worker hears every membership event, and every member of a generation has the same value of
it. So one member, the recorder, writes the lines for all, and agents write none. No member can know
the end of all workers; the agents' exit codes tell it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.membership_events import MembershipEvent


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
        the rank's last sign of life and the event of its loss; null if none was published.
        `rank_left`, of one that was let go, has rank, incarnation and node; `rank_joined` has
        generation too.
    """
    if before is None:
        return []
    losses: dict[Identity, MembershipEvent] = {}
    for event in heard:
        if event.lost and (event.kind == "ended" or event.identity not in losses):
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
            "detected_s": loss.age_s if loss is not None else None,
        }
        events.append((identity, RunEvent("rank_lost", fields)))
    for identity in after.joined_since(before):
        node = after.member(identity.rank).node
        fields = {**_who(identity, node), "generation": after.number}
        events.append((identity, RunEvent("rank_joined", fields)))
    return [event for _, event in sorted(events, key=lambda e: (e[0].rank, e[0].incarnation))]


def _who(identity: Identity, node: str) -> dict[str, Any]:
    return {"rank": identity.rank, "incarnation": identity.incarnation, "node": node}
