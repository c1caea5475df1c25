"""The messages of a window as all ranks saw them: each tells the others, and the ends are joined.

A rank's table has a row of five integers for each end of a message: its key, when it began and how
long it took by this rank's clock in nanoseconds, its group and other rank, its bytes and what it
stands for. Row 0 tells of the rank itself. All ranks have all tables, and so conclude the same.
"""

from __future__ import annotations

import platform
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.parallel.comm.flight_recorder import FlightRecorder, MessageEnd
from holdfast.parallel.comm.protocol import Communicator
from holdfast.parallel.comm.tags import TIMINGS
from holdfast.parallel.comm.timings.messages import (
    NeighbourTimes,
    TimedMessage,
    clock_offsets,
    moved_s,
)
from holdfast.parallel.reading import read_regular

LEAST_BYTES = 1 << 12
"""Shorter messages tell more of the processors than of the links."""
_SAMPLES = 16
"""Messages of an edge that are told of, the newest."""
_LEAST_ROWS, _MOST_ROWS = 64, 512
_ALL_ROWS = 1 << 16
"""Of all ranks together, so that many ranks tell less each."""
_COLUMNS = 5
_STANDS_BITS, _PEER_BITS = 20, 24
_TURNS = 2
"""Short messages by which clocks are compared."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Window:
    """What all ranks know of their messages."""

    messages: Sequence[TimedMessage]
    """Those that both ends told of."""
    step_s: float
    """The usual length of a step, on the median rank."""
    trial_s: float
    """What the last trial of links took, on the slowest rank."""
    shares_clock: bool
    """Whether all ranks are on one machine."""


def rows_of(ranks: int) -> int:
    """The ends of messages that each of so many ranks tells of at most. Pure."""
    wanted = min(_MOST_ROWS, max(_LEAST_ROWS, 2 * _SAMPLES * (ranks - 1)))
    return max(1, min(wanted, _ALL_ROWS // ranks))


def table_of(
    rank: int,
    ends: Iterable[MessageEnd],
    rows: int,
    *,
    near: NeighbourTimes,
    step_s: float,
    trial_s: float = 0.0,
) -> Tensor:
    """What a rank tells of the ends of its messages, the newest of each edge. Pure.

    Returns:
        int64[1 + rows, 5]; rows of nothing are zero.
    """
    edges: dict[tuple[str, int, bool], list[MessageEnd]] = defaultdict(list)
    for end in ends:
        edges[end.group, end.peer, end.is_send].append(end)
    samples = min(_SAMPLES, rows // max(1, len(edges)))
    clocks = (int(near.from_before_s * 1e9), int(near.from_after_s * 1e9))
    table = [[near.machine, int(step_s * 1e9), *clocks, int(trial_s * 1e9)]]
    for (group, peer, is_send), seen in edges.items():
        kind = zlib.crc32(group.encode())
        path = (rank, peer) if is_send else (peer, rank)
        told = seen[-samples:] if samples else []
        stands = min((1 << _STANDS_BITS) - 1, len(seen) * 16 // max(1, len(told)))
        table += [
            [
                # The hash of a tuple of integers is the same in every process.
                hash((kind, end.tag, end.turn, *path)),
                int(end.began_s * 1e9),
                max(1, int((end.ended_s - end.began_s) * 1e9)),
                (kind << _PEER_BITS | peer) << 3 | is_send << 2 | end.by_device << 1 | end.is_bound,
                end.bytes << _STANDS_BITS | stands,
            ]
            for end in told
        ]
    table += [[0] * _COLUMNS] * (1 + rows - len(table))
    return torch.tensor(table, dtype=torch.int64)


def compare_clocks(control: Communicator) -> NeighbourTimes:
    """Compare this rank's clock with its neighbours'. Collective over all ranks."""
    ranks, index, count = control.ranks, control.index, control.size
    peers = (ranks[(index - 1) % count], ranks[(index + 1) % count])
    best = [float("inf"), float("inf")]
    for turn in range(_TURNS if count > 1 else 0):
        for way in (0, 1):  # to the rank after, and then to the rank before
            tag = TIMINGS.tag(_CLOCKS + 2 * turn + way)
            taken = torch.zeros(1, dtype=torch.float64)
            coming = control.receive(taken, peers[way], tag)
            now = torch.tensor([time.monotonic()], dtype=torch.float64)
            going = control.send(now, peers[1 - way], tag)
            coming.wait()
            best[way] = min(best[way], time.monotonic() - taken.item())
            going.wait()
    return NeighbourTimes(_machine(), *(each if count > 1 else 0.0 for each in best))


_CLOCKS = 64
"""The first tag of these; those before are of tables."""


def _machine() -> int:
    """A number of this machine, whose processes share a clock."""
    try:
        name = read_regular(_BOOT, 64)
    except OSError:
        name = platform.node().encode()
    return zlib.crc32(name)


def gathered(control: Communicator, table: Tensor) -> Tensor:
    """The tables of all members, in member order. Collective; by doubling (Bruck et al. 1997)."""
    count, index, ranks = control.size, control.index, control.ranks
    parts = table.new_empty((count, *table.shape))
    parts[0] = table
    distance, number = 1, 0
    while distance < count:
        width, tag = min(distance, count - distance), TIMINGS.tag(number)
        source, target = ranks[(index + distance) % count], ranks[(index - distance) % count]
        coming = control.receive(parts[distance : distance + width], source, tag)
        going = control.send(parts[:width], target, tag)
        coming.wait()
        going.wait()
        distance, number = 2 * distance, number + 1
    return parts[torch.arange(count).sub(index).remainder(count)]


def joined(tables: Tensor, ranks: Sequence[int]) -> Window:
    """The messages of which both ends are in the tables. Pure.

    Args:
        tables: by rank in the order of `ranks`.
    """
    heads = tables[:, 0].tolist()
    steps = sorted(head[1] for head in heads)
    ring = [NeighbourTimes(head[0], head[2] / 1e9, head[3] / 1e9) for head in heads]
    offsets = dict(zip(ranks, clock_offsets(ring), strict=True))
    machines = {rank: near.machine for rank, near in zip(ranks, ring, strict=True)}
    ends = tables[:, 1:].reshape(-1, _COLUMNS)
    ends = ends[ends[:, 2] > 0]
    # The source's end of a message before the destination's.
    is_send = ends[:, 3] >> 2 & 1
    ends = ends[torch.argsort(1 - is_send, stable=True)]
    ends = ends[torch.argsort(ends[:, 0], stable=True)]
    is_send = ends[:, 3] >> 2 & 1
    pairs = (ends[1:, 0] == ends[:-1, 0]) & (is_send[:-1] == 1) & (is_send[1:] == 0)
    at = pairs.nonzero().flatten()
    messages = [
        _message(sent, taken, offsets, machines)
        for sent, taken in zip(ends[at].tolist(), ends[at + 1].tolist(), strict=True)
    ]
    trial_s = max(head[4] for head in heads) / 1e9
    shares_clock = len({near.machine for near in ring}) == 1
    return Window(messages, steps[len(steps) // 2] / 1e9, trial_s, shares_clock)


def _message(
    sent: Sequence[int],
    taken: Sequence[int],
    offsets: dict[int, float],
    machines: dict[int, int],
) -> TimedMessage:
    """A message from the rows of its source and of its destination."""
    destination, source = (row[3] >> 3 & (1 << _PEER_BITS) - 1 for row in (sent, taken))
    near = "near" if machines[source] == machines[destination] else "far"
    # Times from the posting of the receive, so that large numbers of nanoseconds lose no digits.
    ready_s = (sent[1] - taken[1]) / 1e9 + offsets[destination] - offsets[source]
    took_s = taken[2] / 1e9
    # Both ends of a transfer between devices end together: the shorter span is that of the later.
    by_device = sent[3] & taken[3] & 2
    seconds = min(took_s, sent[2] / 1e9) if by_device else moved_s(ready_s, 0.0, took_s)
    return TimedMessage(
        source,
        destination,
        f"{taken[3] >> 3 + _PEER_BITS:08x} {near}",
        taken[4] >> _STANDS_BITS,
        seconds,
        is_bound=bool(taken[3] & 1),
        stands_for=(taken[4] & (1 << _STANDS_BITS) - 1) / 16,
    )


def window_of(
    control: Communicator,
    recorder: FlightRecorder,
    since: int,
    rank: int,
    *,
    trial_s: float = 0.0,
    shares_clock: bool = False,
) -> Window:
    """The messages since `FlightRecorder.begin_window`. Collective over all ranks.

    Args:
        since: the result of that call, which all ranks made at the same place.
        trial_s: what the last trial of links took on this rank.
        shares_clock: whether an earlier window of the same ranks has shown that they share one.
    """
    ends = recorder.message_ends(since, LEAST_BYTES)
    table = table_of(
        rank,
        ends,
        rows_of(control.size),
        near=NeighbourTimes(_machine(), 0, 0) if shares_clock else compare_clocks(control),
        step_s=recorder.median_step_s,
        trial_s=trial_s,
    )
    return joined(gathered(control, table), control.ranks)
