"""Logs of ranks whose network and processors have a fault, on a simulated clock.

Each rank has a clock of its own, which is off by up to seconds. In each operation of a window every
rank computes, and then sends one message to another and receives one. A message leaves once it is
ready and its receive is posted; each end notes its times by its own clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.parallel.comm import FlightRecord, Operation

NOISE = 0.1
"""Sigma of the logarithm of each time."""
COMPUTE_S, LATENCY_S, BYTES_PER_S = 0.02, 3e-5, 1.25e9
SIZES = (1 << 18, 1 << 20, 3 << 20)

Fault = Literal["slow link", "slow sender", "slow receiver", "slow host", "slow rank", "none"]


@dataclass(frozen=True, slots=True)
class LoggedMessage:
    """Both ends of a message, by the clocks of their ranks."""

    source: int
    destination: int
    bytes: int
    ready_s: float
    posted_s: float
    done_s: float


@dataclass(frozen=True, slots=True)
class Log:
    """What the ranks noted in a window."""

    messages: Sequence[LoggedMessage]
    between_neighbours_s: Sequence[tuple[float, float]]
    """By rank, what short messages of the rank before and of the one after seemed to take, by the
    clocks of both ends."""
    computed_s: dict[int, list[float]]
    waited_s: dict[int, float]


def simulated_log(
    draw: random.Random,
    fault: Fault,
    at: int,
    *,
    ranks: int = 16,
    strides: Sequence[int] = (1, 5),
    slowness: float = 2.0,
    operations: int = 8,
) -> Log:
    """A window of so many operations over each stride.

    Args:
        at: the rank with the fault; of a slow link its source, whose destination is the next rank.
    """
    offsets = [draw.uniform(-5, 5) for _ in range(ranks)]
    now = draw.uniform(0, 1e6)
    messages, computed = [], {rank: list[float]() for rank in range(ranks)}
    waited = dict.fromkeys(range(ranks), 0.0)
    for stride in strides:
        for number in range(operations):
            size = SIZES[number % len(SIZES)]
            here = [COMPUTE_S * _noise(draw) for _ in range(ranks)]
            if fault == "slow rank":
                here[at] *= slowness
            begins = [now + seconds for seconds in here]
            ends = []
            for source in range(ranks):
                target = (source + stride) % ranks
                takes = (LATENCY_S + size / BYTES_PER_S) * _noise(draw)
                hit = {
                    "slow link": source == at and target == (at + 1) % ranks,
                    "slow sender": source == at,
                    "slow receiver": target == at,
                    "slow host": at in (source, target),
                }.get(fault, False)
                end = max(begins[source], begins[target]) + takes * (slowness if hit else 1)
                ends.append(end)
                messages.append(
                    LoggedMessage(
                        source,
                        target,
                        size,
                        begins[source] + offsets[source],
                        begins[target] + offsets[target],
                        end + offsets[target],
                    )
                )
            now = max(ends)
            for rank in range(ranks):
                computed[rank].append(here[rank])
                waited[rank] += now - begins[rank]
    clocks = [
        (
            offsets[rank] - offsets[rank - 1] + LATENCY_S * _noise(draw),
            offsets[rank] - offsets[(rank + 1) % ranks] + LATENCY_S * _noise(draw),
        )
        for rank in range(ranks)
    ]
    return Log(messages, clocks, computed, waited)


def _noise(draw: random.Random) -> float:
    return math.exp(draw.gauss(0, NOISE))


def hung_records(
    draw: random.Random, at: int, *, cut: bool, ranks: int = 16, stride: int = 1
) -> list[FlightRecord]:
    """Flight records of ranks that have hung in a collective round a ring.

    In each round a rank sends on what it got in the one before, and waits for both messages.

    Args:
        at: the rank that never came; or, of the link that was cut after both ends had posted, the
            source.
        cut: whether it is the link.
    """
    first_s, rounds = draw.uniform(10, 20), ranks - 1
    arrived = {rank: 0 for rank in range(ranks) if cut or rank != at}
    """By rank, the rounds that it has ended."""

    def passes(source: int, number: int) -> bool:
        target = (source + stride) % ranks
        there = min(arrived.get(source, -1), arrived.get(target, -1)) >= number
        return there and not (cut and source == at)

    going = True
    while going:
        going = False
        for rank, done in arrived.items():
            if done < rounds and passes(rank, done) and passes((rank - stride) % ranks, done):
                arrived[rank], going = done + 1, True
    records = []
    for rank in range(ranks):
        peers = ((rank - stride) % ranks, (rank + stride) % ranks)
        earlier = draw.randrange(1, 4)
        operations = [
            _operation(number, side, peers[side], tag=number, posted_s=number / 10, ended=True)
            for number in range(earlier)
            for side in (0, 1)
        ]
        for number in range(min(rounds, arrived.get(rank, -1) + 1)):
            ended = (passes(peers[0], number), passes(rank, number))
            operations += [
                _operation(
                    len(operations) + side,
                    side,
                    peers[side],
                    tag=1000 + number,
                    posted_s=first_s + number / 10,
                    ended=ended[side],
                )
                for side in (0, 1)
            ]
        records.append(FlightRecord(rank, 100 + rank, 1, 3, 0.0, tuple(operations), (0.0, 1.0)))
    return records


def _operation(
    number: int, side: int, peer: int, *, tag: int, posted_s: float, ended: bool
) -> Operation:
    return Operation(
        number + 1,
        "data",
        "reduce_scatter",
        "send" if side else "receive",
        peer,
        1 << 20,
        tag,
        "done" if ended else "open",
        posted_s,
        posted_s,
        posted_s,
        posted_s + 0.05 if ended else math.nan,
    )
