"""The hang rule: the limit of a wait, the evidence, the rank to blame, and its excuses. Pure.

A stopped rank cannot watch itself. A rank that waits for a message cannot tell a hanging peer from
one that itself waits for a third. So agents read the flight records of their workers
(parallel/comm/flight_recorder.py) from outside, and tell each other of waits that last too long.
All waits together show the culprit: it is at the end of the chain, others wait for it, and it waits
for none.

The agent of that rank decides, because it alone can read the rank's own record: a rank that is
busy, was busy a short time ago, or itself waits for a message, is excused. So times of different
machines are never compared: agents tell each other durations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from holdfast.elastic.generation import Identity, parse_identities
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.comm import FlightRecord, Operation

LIMIT_STEPS = 5.0
"""A wait is too long only if it is also longer than this many median steps."""
COLLECT_S = 1.0
"""Seconds to collect further waits after the first: all ranks soon wait behind one that hangs."""

PeerVerdict = Literal[
    "the peer never started it",
    "the peer started it, neither has finished",
    "the peer has finished it, it has not arrived",
    "nothing is known of the peer",
]
_BOTH_POSTED: tuple[PeerVerdict, ...] = (
    "the peer started it, neither has finished",
    "the peer has finished it, it has not arrived",
)
_COUNTERPART = {"send": "receive", "receive": "send"}


@dataclass(frozen=True, slots=True)
class Wait:
    """One worker's wait that is longer than normal, from its flight record."""

    peers: frozenset[int]
    """The ranks that it waits for."""
    seconds: float
    operation: str
    """The operation, and whether the peer never started or never finished it; for a person."""


@dataclass(frozen=True, slots=True)
class SilentOperation:
    """An operation that a rank has waited for too long."""

    rank: int
    step: int
    operation: Operation
    silent_s: float
    """Seconds that the rank has waited for it."""
    verdict: PeerVerdict
    suspects: tuple[int, ...]
    """The ranks to blame for this wait, as far as the records that were read show it."""

    @property
    def link(self) -> tuple[int, int] | None:
        """The source and the destination of a message that both have posted and that does not come.

        Then the link between them hangs, or one of both processes stands still. None if a rank has
        not come to it, if nothing is known of the peer, or if a transport carries it as a whole.
        """
        operation = self.operation
        if operation.direction == "collective" or self.verdict not in _BOTH_POSTED:
            return None
        ends = (self.rank, operation.peer)
        return ends if operation.direction == "send" else ends[::-1]

    def describe(self) -> str:
        """The operation in one line, for logs and incident records."""
        operation = self.operation
        preposition = {"send": "to", "receive": "from", "collective": "with"}[operation.direction]
        name = operation.operation
        if name not in ("send", "receive") and operation.direction != "collective":
            name = f"{name}, {operation.direction}"
        peer = "its group" if operation.peer < 0 else f"rank {operation.peer}"
        suspects = ", ".join(map(str, self.suspects))
        suspected = f"; suspected: rank {suspects}" if suspects else ""
        if self.link is not None:
            source, destination = self.link
            suspected = (
                f"; the link from rank {source} to rank {destination} hangs, unless rank "
                f"{operation.peer} stands still"
            )
        step = f"in step {self.step}" if self.step else "before its first step"
        return (
            f"rank {self.rank}: {name} {preposition} {peer} ({operation.group}, "
            f"tag {operation.tag}, {operation.bytes} bytes) silent for {self.silent_s:.1f} s "
            f"{step}: {self.verdict}{suspected}"
        )


# The limit.


@dataclass(frozen=True, slots=True)
class HangLimits:
    """The patience of the hang rule."""

    hang_timeout_s: float = 10.0
    startup_grace_s: float = 120.0
    """The patience while the usual length of a step is unknown."""

    def of(self, record: FlightRecord) -> float:
        """Seconds that a rank may wait for one operation, or keep others waiting."""
        if not record.median_step_s:
            return max(self.hang_timeout_s, self.startup_grace_s)
        return max(self.hang_timeout_s, LIMIT_STEPS * record.median_step_s)


Since = Callable[[float], float]
"""The seconds that count since a time of the monotonic clock; see `FairClock.since`."""


def late_operations(record: FlightRecord, since: Since, limits: HangLimits) -> list[Operation]:
    """The operations that a worker has waited for too long."""
    limit_s = limits.of(record)
    return [o for o in record.waited_for if since(o.waited_s) > limit_s]


# The evidence.


def wait_of(
    own: FlightRecord, others: Iterable[FlightRecord], since: Since, limits: HangLimits
) -> Wait | None:
    """The wait of a worker that has lasted too long; None if there is none.

    Args:
        others: the readable records of further workers, for the description.
    """
    late = [o for o in late_operations(own, since, limits) if o.peer >= 0]
    if not late:
        return None
    found = silent_operations([*others, own], since, limits)
    described = next((s.describe() for s in found if s.rank == own.rank), "")
    longest_s = max(since(operation.waited_s) for operation in late)
    return Wait(frozenset(operation.peer for operation in late), longest_s, described)


def silent_operations(
    records: Iterable[FlightRecord], since: Since, limits: HangLimits
) -> list[SilentOperation]:
    """The longest overdue operation of each rank that has one, by rank.

    Args:
        records: the readable records of all ranks; those of other machines with their clocks
            shifted (`FlightRecord.unix_offset_s`).
    """
    # If a rank was replaced, its newest record counts.
    by_rank = {r.rank: r for r in sorted(records, key=lambda record: record.generation)}
    waits = {
        rank: peers
        for rank, record in by_rank.items()
        if (peers := frozenset(p for o in record.waited_for for p in _waited_on(o, by_rank)))
    }
    found = []
    for rank, record in sorted(by_rank.items()):
        late = late_operations(record, since, limits)
        if not late:
            continue
        longest = min(late, key=lambda operation: operation.waited_s)
        peers = frozenset(_waited_on(longest, by_rank))
        found.append(
            SilentOperation(
                rank=rank,
                step=record.step,
                operation=longest,
                silent_s=since(longest.waited_s),
                verdict=_verdict(rank, longest, by_rank),
                suspects=tuple(sorted(blame(_chain(rank, waits | {rank: peers})))),
            )
        )
    return found


def _waited_on(operation: Operation, records: Mapping[int, FlightRecord]) -> set[int]:
    """The ranks that must act before an operation ends; none if no rank waits for it."""
    if not operation.is_waited_for:
        return set()
    if operation.direction == "collective":
        return set(_missing(operation, records))
    return {operation.peer}


def _verdict(rank: int, operation: Operation, records: Mapping[int, FlightRecord]) -> PeerVerdict:
    if operation.direction == "collective":
        missing = _missing(operation, records)
        return (
            "the peer never started it" if missing else "the peer started it, neither has finished"
        )
    peer = records.get(operation.peer)
    if peer is None:
        return "nothing is known of the peer"
    matching = [o for o in peer.operations if _matches(o, rank, operation)]
    earlier = [
        o
        for o in records[rank].operations
        if o.number < operation.number
        and o.outcome == "done"
        and (o.group, o.direction, o.peer, o.tag)
        == (operation.group, operation.direction, operation.peer, operation.tag)
    ]
    # Tags repeat in every step: operations that matched an earlier message of this rank do not
    # count.
    if not matching or (earlier and matching[-1].posted_s <= earlier[-1].finished_s):
        return "the peer never started it"
    if matching[-1].outcome == "done":
        return "the peer has finished it, it has not arrived"
    return "the peer started it, neither has finished"


def _matches(other: Operation, rank: int, operation: Operation) -> bool:
    return (
        other.group == operation.group
        and other.tag == operation.tag
        and other.peer == rank
        and other.direction == _COUNTERPART[operation.direction]
    )


def _missing(operation: Operation, records: Mapping[int, FlightRecord]) -> list[int]:
    """The members of the group that have not come to a collective, whose tag counts them."""
    newest = {
        rank: max(tags)
        for rank, record in records.items()
        if (
            tags := [
                o.tag
                for o in record.operations
                if o.group == operation.group and o.direction == "collective"
            ]
        )
    }
    return sorted(rank for rank, tag in newest.items() if tag < operation.tag)


# The blame.


def blame(waits: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The ranks that hang, from the ranks that each waiting rank waits for.

    These are the ranks that are waited for and do not wait. If all wait in a circle (after a lost
    message, or with programs that do not fit together), it is the rank that most wait for, so that
    the circle is broken.
    """
    waited_for = Counter(peer for peers in waits.values() for peer in peers)
    idle = frozenset(waited_for) - waits.keys()
    if idle or not waited_for:
        return idle
    most = max(waited_for.values())
    return frozenset([min(rank for rank, count in waited_for.items() if count == most)])


def _chain(rank: int, waits: Mapping[int, frozenset[int]]) -> dict[int, frozenset[int]]:
    """The waits that one rank's wait leads to, its own included."""
    found: dict[int, frozenset[int]] = {}
    following = {rank}
    while following:
        some = following.pop()
        if some in waits and some not in found:
            found[some] = waits[some]
            following |= waits[some]
    return found


# The excuses.


def is_excused(
    accused: FlightRecord, waited_s: float, now_s: float, since: Since, limits: HangLimits
) -> bool:
    """Whether a rank that others wait for does not hang, by its own record.

    Args:
        waited_s: the longest time that others have waited for it.
        now_s: the monotonic clock's time when the record was read.
    """
    limit_s = limits.of(accused)
    if waited_s <= limit_s:
        return True
    if accused.busy is not None:
        return now_s <= accused.busy_until_s
    return since(accused.busy_ended_s) <= limit_s if accused.busy_ended_s else False


def overdue_s(record: FlightRecord, since: Since, limits: HangLimits) -> float:
    """Seconds for which a rank has been busy for longer than it said, and with no message; else 0.

    Less than a wait may last counts as none. It hangs then, even if no rank waits for it: all may
    be in the same call, of the same disk. A rank that itself waits for a message does not count.
    """
    if record.busy is None or record.waited_for:
        return 0.0
    times = (t for o in record.operations for t in (o.posted_s, o.finished_s) if not math.isnan(t))
    over_s = since(max(record.busy_until_s, max(times, default=0.0)))
    return over_s if over_s > limits.of(record) else 0.0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A rank that the waits of one generation point at."""

    rank: int
    waited_s: float
    """The longest time that a rank has waited for it."""
    reason: str
    """The reason, for a person."""
    in_circle: bool
    """Whether it waits too: all wait in a circle, which its end breaks."""


@dataclass(frozen=True, slots=True)
class _HeardWait:
    event: MembershipEvent
    at_s: float


@dataclass(slots=True)
class HangJudge:
    """Collects the `waiting` events of one generation.

    Equal on all agents; the clock is passed in.
    """

    generation: int = 0
    _waits: dict[Identity, _HeardWait] = field(default_factory=dict)

    def enter(self, generation: int) -> None:
        """Enter a new generation, in which no worker waits yet."""
        self.generation, self._waits = generation, {}

    def hear(self, event: MembershipEvent, now_s: float) -> None:
        """Add an event of kind `waiting`, or end that wait if the event names no peers.

        Events of other generations are ignored.
        """
        if event.generation != self.generation:
            return
        if event.peers:
            self._waits[event.identity] = _HeardWait(event, now_s)
        else:
            self._waits.pop(event.identity, None)

    def forget(self, identity: Identity) -> None:
        """End the wait of a worker that is lost; its ranks may have been told by it alone."""
        self._waits.pop(identity, None)

    def suspicions(self, now_s: float) -> list[Suspicion]:
        """The ranks that the waits point at, once all waits have had time to arrive."""
        first_s = min((wait.at_s for wait in self._waits.values()), default=math.inf)
        if now_s - first_s < COLLECT_S:
            return []
        waits = {
            identity.rank: frozenset(i.rank for i in parse_identities(wait.event.peers))
            for identity, wait in self._waits.items()
        }
        return [self._suspicion(rank, waits, now_s) for rank in sorted(blame(waits))]

    def _suspicion(self, rank: int, waits: Mapping[int, frozenset[int]], now_s: float) -> Suspicion:
        by_age = [
            (wait.event.age_s + now_s - wait.at_s, wait.event)
            for identity, wait in sorted(self._waits.items())
            if rank in waits[identity.rank]
        ]
        longest_s = max(seconds for seconds, _ in by_age)
        first = by_age[0][1]
        reason = f"hung: rank {first.identity} {first.cause}"
        return Suspicion(rank, longest_s, reason, in_circle=rank in waits)
