"""The values of a flat index space, in pieces that a change of plan leaves where they are.

What a rank has of an expert is a piece, in each kind of state: when experts come or go, those that
stay are neither copied nor twice in memory. All else between two experts is one piece, too, so that
neighbouring blocks travel without packing. Local; exact-mode safe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.parallel.layout import ParameterSpec
from holdfast.parallel.optimizer.spans import KeptSpans, Span


class Piece(NamedTuple):
    """A part of an index space whose values are in one tensor."""

    name: Hashable
    """What it has: equal for the same elements in another index space."""
    kept: KeptSpans


class FlatValues:
    """A tensor for each piece of an index space. Local."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        make: Callable[[int], Tensor],
        before: FlatValues | None = None,
    ) -> None:
        """Make the tensors, or use those of another plan.

        Args:
            pieces: ascending, without overlaps.
            make: makes the tensor of so many elements.
            before: where it has a piece of the same name, its tensor is used.
        """
        self.pieces = tuple(pieces)
        known = {} if before is None else before._by_name()
        self.tensors: tuple[Tensor, ...] = tuple(
            known[piece.name] if piece.name in known else make(piece.kept.elements)
            for piece in self.pieces
        )
        """Live memory, by piece."""
        self._starts = [piece.kept.spans[0].start for piece in self.pieces]
        self._none = make(0)

    @classmethod
    def zeros(
        cls,
        pieces: Sequence[Piece],
        dtype: torch.dtype,
        device: torch.device | str,
        before: FlatValues | None = None,
        *,
        pinned: bool = False,
    ) -> FlatValues:
        """Zeros, or the tensors of another plan; page-locked if `pinned`."""
        make = partial(torch.zeros, dtype=dtype, device=device, pin_memory=pinned)
        return cls(pieces, make, before)

    def _by_name(self) -> dict[Hashable, Tensor]:
        names = (piece.name for piece in self.pieces)
        return dict(zip(names, self.tensors, strict=True))

    def part(self, start: int, stop: int) -> Tensor:
        """The elements [start, stop): a view.

        Raises:
            ValueError: they are not all in one piece.
        """
        place = bisect_right(self._starts, start) - 1
        if place < 0:
            raise ValueError(f"elements {start} to {stop} are not kept here")
        return self.pieces[place].kept.of(self.tensors[place], start, stop)

    def parts(self, spans: Iterable[Span]) -> list[Tensor]:
        """The elements of spans, one after another: views, several of what is in several pieces."""
        found = []
        for span in spans:
            start = span.start
            while start < span.stop:
                following = bisect_right(self._starts, start)
                ends = self._starts[following : following + 1]
                stop = min([span.stop, *ends])
                found.append(self.part(start, stop))
                start = stop
        return found

    @property
    def dtype(self) -> torch.dtype:
        return self._none.dtype

    @property
    def device(self) -> torch.device:
        return self._none.device

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return sum(values.nbytes for values in self.tensors)

    @property
    def one(self) -> Tensor:
        """The tensor of an index space that is one piece, or none."""
        if len(self.tensors) > 1:
            raise ValueError(f"the values are in {len(self.tensors)} pieces")
        return self.tensors[0] if self.tensors else self._none


def one_piece(kept: KeptSpans) -> list[Piece]:
    """What is kept as a single piece, which is no other's; none if that is nothing. Pure."""
    return [Piece(object(), kept)] if kept.elements else []


def pieces_of(parts: Iterable[tuple[Hashable, int, ParameterSpec, int]]) -> list[Piece]:
    """The pieces of an index space: what follows one another of an expert, or of none. Pure.

    Args:
        parts: of each part, in order and without gaps: its name, the layer, the parameter's row,
            and the elements.
    """
    listed = list(parts)
    ends = list(accumulate((size for *_, size in listed), initial=0))
    found: list[Piece] = []

    def expert_of(place: int) -> tuple[int, int] | None:
        _, layer, spec, _ = listed[place]
        return None if spec.expert is None else (layer, spec.expert)

    for _, places in groupby(range(len(listed)), key=expert_of):
        first, *rest = places
        last = rest[-1] if rest else first
        if ends[first] < ends[last + 1]:
            names = tuple(listed[place][0] for place in (first, *rest))
            found.append(Piece(names, KeptSpans([Span(ends[first], ends[last + 1])])))
    return found
