"""The hang rule: the limit of a wait, the evidence, and the rank to blame. Pure.

A stopped rank cannot watch itself. A rank that waits for a message cannot tell a hanging peer from
one that itself waits for a third. So agents read the flight records of their workers
(parallel/comm/flight_recorder.py) from outside, and tell each other of waits that last too long.
All waits together show the culprit: it is at the end of the chain, others wait for it, and it waits
for none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
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

    def describe(self) -> str:
        """The operation in one line, for logs and incident records."""
        operation = self.operation
        preposition = {"send": "to", "receive": "from", "collective": "with"}[operation.direction]
        name = operation.operation
        if name not in ("send", "receive") and operation.direction != "collective":
            name = f"{name}, {operation.direction}"
        peer = "its group" if operation.peer < 0 else f"rank {operation.peer}"
        suspects = ", ".join(map(str, self.suspects))
        return (
            f"rank {self.rank}: {name} {preposition} {peer} ({operation.group}, "
            f"tag {operation.tag}, {operation.bytes} bytes) silent for {self.silent_s:.1f} s in "
            f"step {self.step}: {self.verdict}; suspected: rank {suspects}"
        )


# The limit.


def limit_s(record: FlightRecord, hang_timeout_s: float) -> float:
    """Seconds that a worker may wait for one operation."""
    return max(hang_timeout_s, LIMIT_STEPS * record.median_step_s)


def late_operations(
    record: FlightRecord, now_s: float, *, hang_timeout_s: float
) -> list[Operation]:
    """The operations that a worker has waited for too long.

    Args:
        now_s: the monotonic clock's time when the record was read.
    """
    limit = limit_s(record, hang_timeout_s)
    return [o for o in record.operations if o.is_waited_for and now_s - o.waited_s > limit]


# The evidence.


def wait_of(
    own: FlightRecord, others: Iterable[FlightRecord], now_s: float, *, hang_timeout_s: float
) -> Wait | None:
    """The wait of a worker that has lasted too long; None if there is none.

    Args:
        others: the readable records of further workers, for the description.
    """
    late = [o for o in late_operations(own, now_s, hang_timeout_s=hang_timeout_s) if o.peer >= 0]
    if not late:
        return None
    found = silent_operations([*others, own], now_s, hang_timeout_s=hang_timeout_s)
    described = next((s.describe() for s in found if s.rank == own.rank), "")
    longest_s = max(now_s - operation.waited_s for operation in late)
    return Wait(frozenset(operation.peer for operation in late), longest_s, described)


def silent_operations(
    records: Iterable[FlightRecord], now_s: float, *, hang_timeout_s: float
) -> list[SilentOperation]:
    """The longest overdue operation of each rank that has one, by rank.

    Args:
        records: the readable records of all ranks; those of other machines with their clocks
            shifted (`FlightRecord.unix_offset_s`).
        now_s: the monotonic clock's time when the records were read.
    """
    # If a rank was replaced, its newest record counts.
    by_rank = {r.rank: r for r in sorted(records, key=lambda record: record.generation)}
    waits = {
        rank: peers
        for rank, record in by_rank.items()
        if (peers := frozenset(p for o in record.operations for p in _waited_on(o, by_rank)))
    }
    found = []
    for rank, record in sorted(by_rank.items()):
        late = late_operations(record, now_s, hang_timeout_s=hang_timeout_s)
        if not late:
            continue
        longest = min(late, key=lambda operation: operation.waited_s)
        peers = frozenset(_waited_on(longest, by_rank))
        found.append(
            SilentOperation(
                rank=rank,
                step=record.step,
                operation=longest,
                silent_s=now_s - longest.waited_s,
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


@dataclass(slots=True)
class HangJudge:
    """Collects the `waiting` events of one generation.

    Equal on all agents; the clock is passed in.
    """

    generation: int = 0
    _waits: dict[Identity, MembershipEvent] = field(default_factory=dict)
    _since_s: float | None = None

    def enter(self, generation: int) -> None:
        """Enter a new generation, in which no worker waits yet."""
        self.generation, self._waits, self._since_s = generation, {}, None

    def hear(self, event: MembershipEvent, now_s: float) -> None:
        """Add an event of kind `waiting`; events of other generations are ignored."""
        if event.generation == self.generation:
            self._waits[event.identity] = event
            self._since_s = now_s if self._since_s is None else self._since_s

    def has(self, identity: Identity) -> bool:
        """Whether this worker's wait is known."""
        return identity in self._waits

    def culprits(self, now_s: float) -> dict[int, str]:
        """The ranks that hang, with reasons, once all waits have had time to arrive."""
        if self._since_s is None or now_s - self._since_s < COLLECT_S:
            return {}
        waits = {
            identity.rank: frozenset(i.rank for i in parse_identities(event.peers))
            for identity, event in self._waits.items()
        }
        found: dict[int, str] = {}
        for rank in blame(waits):
            first = min(
                (e for i, e in self._waits.items() if rank in waits[i.rank]),
                key=lambda e: e.identity,
            )
            found[rank] = f"hung: rank {first.identity} {first.cause}"
        return found
