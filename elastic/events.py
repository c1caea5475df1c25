"""What a change of generation means for the run's record, as values that whoever keeps it writes down.

Every worker hears every notice, and every member of a generation has the same value of it. So one of them,
the one with the lowest rank, writes the events for all; agents write none. What cannot be known by a member,
such as the end of all workers, is told by the exit codes of the agents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.membership_events import Notice


@dataclass(frozen=True, slots=True)
class Event:
    """A line of events.jsonl, without its time."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


def change_events(
    before: Generation | None, after: Generation, heard: Iterable[Notice]
) -> list[Event]:
    """The events of a change of generation: `rank_lost`, `rank_left` and `rank_joined`, by rank. Pure.

    Args:
        before: that the writer was in; None for its first, which has no such events.
        heard: the notices that the writer has had (`Membership.heard`), which say why.
    Returns:
        `rank_lost` has the fields rank, incarnation, node, cause, and detected_s: seconds between the
        rank's last sign of life and the notice of its loss; null if nobody gave notice. `rank_left`, of
        one that was let go, has rank, incarnation and node; `rank_joined` has generation too.
    """
    if before is None:
        return []
    notices: dict[Identity, Notice] = {}
    for notice in heard:
        if notice.lost and (notice.kind == "ended" or notice.identity not in notices):
            notices[notice.identity] = notice
    events: list[tuple[Identity, Event]] = []
    for identity in after.lost_since(before):
        notice = notices.get(identity)
        member = next(m for m in before.members if m.identity == identity)
        if member.leaving:  # its state went to others before
            events.append((identity, Event("rank_left", _who(identity, member.node))))
            continue
        cause = notice.cause if notice is not None else "did not answer"
        fields = {
            **_who(identity, member.node),
            "cause": cause,
            "detected_s": notice.age_s if notice is not None else None,
        }
        events.append((identity, Event("rank_lost", fields)))
    for identity in after.joined_since(before):
        node = after.member(identity.rank).node
        fields = {**_who(identity, node), "generation": after.number}
        events.append((identity, Event("rank_joined", fields)))
    return [event for _, event in sorted(events, key=lambda e: (e[0].rank, e[0].incarnation))]


def _who(identity: Identity, node: str) -> dict[str, Any]:
    return {"rank": identity.rank, "incarnation": identity.incarnation, "node": node}
