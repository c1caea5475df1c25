"""The slow links, senders, receivers and hosts in a matrix of delays. Pure.

One cell of the matrix that is slow is a link; a row is a sender, a column a receiver, and both of
one rank a host (Dong et al. 2024). A rank with a single edge has no row: whether its link is slow
or its end of it stays open, and is said to.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from holdfast.parallel.comm.timings.matrix import Delay, Edge

Side = Literal["link", "sender", "receiver", "host", "open"]


@dataclass(frozen=True, slots=True)
class SlowLink:
    """A part of the network that is slower than others of its kind."""

    side: Side
    """"link": between two ranks, in one direction. "sender", "receiver", "host": all that one rank
    sends, receives, or both. "open": a link, or one of its ends."""
    source: int | None
    """The rank that sends; None for a receiver."""
    destination: int | None
    """The rank that receives; None for a sender, and the same as the source for a host."""
    ratio: float
    """How many times as long as usual its messages take."""
    excess_s: float
    """The seconds by which its messages took longer; of several links, those of the slowest."""
    source_may: bool = False
    """Of an open one: whether the sending side of the source may be what is slow."""
    destination_may: bool = False

    @property
    def place(self) -> str:
        """What is slow, for a person."""
        match self.side:
            case "sender":
                return f"the sending side of rank {self.source}"
            case "receiver":
                return f"the receiving side of rank {self.destination}"
            case "host":
                return f"the network of rank {self.source}, in both directions"
        told = [f"the link from rank {self.source} to rank {self.destination}"]
        if self.source_may:
            told.append(f"the sending side of rank {self.source}")
        if self.destination_may:
            told.append(f"the receiving side of rank {self.destination}")
        return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} or {told[-1]}"


def slow_links(matrix: Mapping[Edge, Delay], factor: float) -> list[SlowLink]:
    """What is slow in a matrix, the slowest first.

    Args:
        factor: how many times as long as usual messages take that are slow.
    """
    rows = {source for source, _ in matrix}
    columns = {destination for _, destination in matrix}
    row = {rank: {e: d for e, d in matrix.items() if e[0] == rank} for rank in rows}
    column = {rank: {e: d for e, d in matrix.items() if e[1] == rank} for rank in columns}
    sending = {rank for rank in rows if _is_slow(row[rank], factor)}
    receiving = {rank for rank in columns if _is_slow(column[rank], factor)}
    found = [_one_side("host", rank, row[rank] | column[rank]) for rank in sending & receiving]
    found += [_one_side("sender", rank, row[rank]) for rank in sending - receiving]
    found += [_one_side("receiver", rank, column[rank]) for rank in receiving - sending]
    for (source, destination), delay in matrix.items():
        if delay.ratio <= factor or source in sending or destination in receiving:
            continue
        may = (len(row[source]) == 1, len(column[destination]) == 1)
        side: Side = "open" if any(may) else "link"
        found.append(SlowLink(side, source, destination, delay.ratio, delay.excess_s, *may))
    return sorted(found, key=lambda slow: (-slow.ratio, slow.place))


def _is_slow(line: Mapping[Edge, Delay], factor: float) -> bool:
    """Whether a row or a column is slow as a whole. Of two edges both must be."""
    return len(line) > 1 and statistics.median_low(d.ratio for d in line.values()) > factor


def _one_side(side: Side, rank: int, line: Mapping[Edge, Delay]) -> SlowLink:
    ratio = statistics.median(delay.ratio for delay in line.values())
    excess_s = max(delay.excess_s for delay in line.values())
    source = None if side == "receiver" else rank
    destination = None if side == "sender" else rank
    return SlowLink(side, source, destination, ratio, excess_s)
