"""The pieces of a slice that attend as one: its tokens, or those of one document in it. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from holdfast.parallel.pipeline import Documents

Index = tuple[slice, slice, slice]
"""Of some places of some sequences in [batch, heads, places]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a slice that attend to one range of keys."""

    rows: slice
    """The sequences of the micro-batch."""
    start: int
    stop: int
    """Their places in the sequence: [start, stop)."""
    first: int
    """The first place that they attend to. Keys before `start` are all seen by all of them, if
    there is no window."""

    @property
    def queries(self) -> Index:
        """The index of their keys in [batch, heads, seq]."""
        return self.rows, slice(None), slice(self.start, self.stop)

    @property
    def before(self) -> Index:
        """The index in [batch, heads, seq] of the keys before them."""
        return self.rows, slice(None), slice(self.first, self.start)

    def seen(self, place: int = 0) -> Index:
        """The index in [batch, heads, places from `place` on] of all keys that some of them see."""
        return self.rows, slice(None), slice(self.first - place, self.stop - place)

    def within(self, place: int) -> Index:
        """Their index in [batch, heads, places from `place` on]."""
        return self.rows, slice(None), slice(self.start - place, self.stop - place)


def pieces_of(
    start: int, stop: int, documents: Documents | None, batch: int, window: int = 0
) -> Iterator[Piece]:
    """The pieces of the slice [start, stop) in all sequences of a micro-batch.

    Where documents do not matter, the sequences are computed together.

    Args:
        window: the keys that a query sees, itself included: pieces are no longer than that; 0: all.
    """
    for piece in _whole_pieces(start, stop, documents, batch):
        for begin in range(piece.start, piece.stop, window or piece.stop - piece.start):
            end = min(begin + window, piece.stop) if window else piece.stop
            first = max(piece.first, begin - window + 1) if window else piece.first
            yield Piece(piece.rows, begin, end, first)


def _whole_pieces(
    start: int, stop: int, documents: Documents | None, batch: int
) -> Iterator[Piece]:
    if documents is None:
        yield Piece(slice(0, batch), start, stop, 0)
        return
    ends = documents.cu_seqlens
    seq_len = ends[-1] // batch
    for row in range(batch):
        base = row * seq_len
        at = bisect_right(ends, base + start) - 1
        while at + 1 < len(ends) and ends[at] < base + stop:
            begin, end = ends[at] - base, ends[at + 1] - base
            yield Piece(slice(row, row + 1), max(begin, start), min(end, stop), begin)
            at += 1
