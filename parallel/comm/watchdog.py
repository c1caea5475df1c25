"""Which operations hang, and on whom: a judgement over the records of the ranks of one machine or more.

A rank that is stopped cannot watch itself, and one that waits cannot tell why it waits in vain. So an
agent reads the records (parallel/comm/flight_recorder.py) from outside and follows who waits for whom: at the end of
the chain stands the rank that does not wait itself, and has not done what the others wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.parallel.comm.flight_recorder import Direction, FlightRecord, Operation, read_record

Verdict = Literal[
    "the peer never started it",
    "the peer started it, neither has finished",
    "the peer has finished it, it has not arrived",
    "nothing is known of the peer",
]

_COUNTERPART: dict[Direction, Direction] = {"send": "receive", "receive": "send"}


@dataclass(frozen=True, slots=True)
class SilentOperation:
    """An operation that a rank has waited for too long."""

    rank: int
    step: int
    operation: Operation
    silent_s: float
    """How long the rank has waited for it."""
    verdict: Verdict
    suspects: tuple[int, ...]
    """The ranks at the end of the chain of waiting; all of a circle when it closes (a deadlock)."""

    def describe(self) -> str:
        """One line for logs and incident records."""
        operation = self.operation
        preposition = {"send": "to", "receive": "from", "collective": "with"}[operation.direction]
        name = operation.operation
        if name not in ("send", "receive") and operation.direction != "collective":
            name = f"{name}, {operation.direction}"
        peer = "its group" if operation.peer < 0 else f"rank {operation.peer}"
        suspects = ", ".join(map(str, self.suspects))
        return (
            f"rank {self.rank}: {name} {preposition} {peer} ({operation.group}, tag {operation.tag}, "
            f"{operation.bytes} bytes) silent for {self.silent_s:.1f} s in step {self.step}: "
            f"{self.verdict}; suspected: rank {suspects}"
        )


def read_records(paths: Iterable[Path]) -> list[FlightRecord]:
    """The records that exist; a rank that has not made its record yet is left out. Local."""
    records = []
    for path in paths:
        try:
            records.append(read_record(path))
        except FileNotFoundError:
            continue
    return records


def silent_operations(
    records: Iterable[FlightRecord], now_s: float, *, hang_timeout_s: float, steps: float = 5.0
) -> list[SilentOperation]:
    """Operations waited for longer than `hang_timeout_s` and than `steps` median steps. Pure.

    Args:
        records: of all ranks that can be read; those of other machines with their clocks shifted
            (`FlightRecord.unix_offset_s`).
        now_s: the monotonic clock's time when the records were read.
    Returns:
        The longest silent operation of each rank that has any, by rank.
    """
    # Of a rank that was replaced the newest record counts.
    by_rank = {
        record.rank: record for record in sorted(records, key=lambda record: record.generation)
    }
    waiting = {
        rank: [o for o in record.operations if o.is_waited_for] for rank, record in by_rank.items()
    }
    found = []
    for rank, record in sorted(by_rank.items()):
        limit_s = max(hang_timeout_s, steps * record.median_step_s)
        silent = [o for o in waiting[rank] if now_s - o.waited_s > limit_s]
        if not silent:
            continue
        longest = min(silent, key=lambda o: o.waited_s)
        found.append(
            SilentOperation(
                rank=rank,
                step=record.step,
                operation=longest,
                silent_s=now_s - longest.waited_s,
                verdict=_verdict(rank, longest, by_rank),
                suspects=_suspects(rank, longest, by_rank, waiting),
            )
        )
    return found


def _verdict(rank: int, operation: Operation, records: Mapping[int, FlightRecord]) -> Verdict:
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
    # Tags come again in every step: what matched an earlier message of this rank does not count.
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
    """Members of the group that have not come to a collective; its tag counts them."""
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


def _suspects(
    rank: int,
    operation: Operation,
    records: Mapping[int, FlightRecord],
    waiting: Mapping[int, list[Operation]],
) -> tuple[int, ...]:
    """The ends of all chains of waiting that begin with `operation`."""
    seen: set[int] = {rank}
    ends: set[int] = set()
    following = _waited_on(operation, records)
    while following:
        peer = following.pop()
        if peer in seen:
            continue
        seen.add(peer)
        on = {p for o in waiting.get(peer, ()) for p in _waited_on(o, records)}
        if on:
            following |= on
        else:
            ends.add(peer)
    return tuple(sorted(ends or seen))


def _waited_on(operation: Operation, records: Mapping[int, FlightRecord]) -> set[int]:
    if operation.direction == "collective":
        return set(_missing(operation, records))
    return {operation.peer}
