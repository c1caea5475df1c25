"""The matrix of delays: how much longer than usual messages take from one rank to another. Pure.

The method is that of C4 (Dong et al. 2024): messages of a training repeat, so each is compared with
what its size takes on the usual link of its kind.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.parallel.comm.timings.messages import TimedMessage

LEAST_MESSAGES = 8
"""Messages from one rank to another that suffice for a judgement."""

_USUAL = 1.25
"""A message that may have been quicker counts if it took at most so many times the usual."""


@dataclass(frozen=True, slots=True)
class LinkModel:
    """What messages take on the usual link of a kind."""

    latency_s: float
    per_byte_s: float

    def seconds(self, size: int) -> float:
        return self.latency_s + size * self.per_byte_s


@dataclass(frozen=True, slots=True)
class Delay:
    """The messages from one rank to another, beside the usual ones of their kind."""

    ratio: float
    """How many times as long as usual they take."""
    excess_s: float
    """The seconds by which all of them together took longer than usual."""


Edge = tuple[int, int]
"""A source and a destination."""


def fitted(points: Sequence[tuple[int, float]]) -> LinkModel:
    """The latency and the time per byte that fit some sizes and seconds best, by relative error.

    Neither is negative. With one size alone it all counts as time per byte.
    """
    rows = [(1 / seconds, size / seconds) for size, seconds in points]
    xx, xy, yy = (
        sum(x * x for x, _ in rows),
        sum(x * y for x, y in rows),
        sum(y * y for _, y in rows),
    )
    x, y = sum(x for x, _ in rows), sum(y for _, y in rows)
    determinant = xx * yy - xy * xy
    if len({size for size, _ in points}) > 1 and determinant > 1e-12 * xx * yy:
        latency_s, per_byte_s = (
            (x * yy - y * xy) / determinant,
            (y * xx - x * xy) / determinant,
        )
        if latency_s >= 0 and per_byte_s >= 0:
            return LinkModel(latency_s, per_byte_s)
        if per_byte_s < 0:
            return LinkModel(x / xx, 0.0)
    return LinkModel(0.0, y / yy)


def delays(messages: Iterable[TimedMessage]) -> dict[Edge, Delay]:
    """The delay of each pair of ranks with enough messages.

    A pair with messages of several kinds has the delay of the kind in which it loses most.
    """
    found: dict[Edge, Delay] = {}
    by_kind: dict[str, dict[Edge, list[TimedMessage]]] = defaultdict(lambda: defaultdict(list))
    for message in messages:
        if message.seconds > 0 and message.bytes > 0:
            by_kind[message.kind][message.source, message.destination].append(message)
    for edges in by_kind.values():
        for edge, delay in _of_kind(edges).items():
            if edge not in found or delay.excess_s > found[edge].excess_s:
                found[edge] = delay
    return found


def _of_kind(edges: Mapping[Edge, Sequence[TimedMessage]]) -> dict[Edge, Delay]:
    if len(edges) < 2:  # there is nothing to compare with
        return {}
    by_size: dict[int, list[float]] = defaultdict(list)
    for sent in edges.values():
        times: dict[int, list[float]] = defaultdict(list)
        for message in [m for m in sent if not m.is_bound] or sent:
            times[message.bytes].append(message.seconds)
        for size, seconds in times.items():
            by_size[size].append(statistics.median(seconds))
    model = fitted([(size, statistics.median_low(found)) for size, found in by_size.items()])
    known = {edge: _known(sent, model) for edge, sent in edges.items()}
    known = {edge: found for edge, found in known.items() if len(found) >= LEAST_MESSAGES}
    if len(known) < 2:
        return {}
    ratios = {edge: statistics.median(ratio for _, ratio in found) for edge, found in known.items()}
    # The lower of two: with a pair of edges the quicker is the usual one.
    usual = statistics.median_low(ratios.values())
    return {
        edge: Delay(
            ratios[edge] / usual,
            sum(m.seconds * (1 - usual / ratio) * m.stands_for for m, ratio in found),
        )
        for edge, found in known.items()
    }


def _known(sent: Sequence[TimedMessage], model: LinkModel) -> list[tuple[TimedMessage, float]]:
    """Messages with what they took of the usual time, without those that may have been usual."""
    ratios = [(message, message.seconds / model.seconds(message.bytes)) for message in sent]
    return [(message, ratio) for message, ratio in ratios if ratio < _USUAL or not message.is_bound]
