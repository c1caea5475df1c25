"""The places of one rank's parameters in one flat index space, so that spans of blocks travel
without packing, and the elements of it that the rank keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from holdfast.parallel.layout import Box, HeldRow, ParameterSpec
from holdfast.parallel.optimizer.flat_values import FlatValues, Piece, one_piece, pieces_of
from holdfast.parallel.optimizer.spans import KeptSpans, Span

ALIGNMENT_ELEMENTS = 64
"""Local parameters start at multiples of this: 64 bytes or more for every dtype in use."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The position of one segment of a local parameter in the flat buffer."""

    row: HeldRow
    offset: int
    """The first element in the flat buffer."""
    parameter: nn.Parameter = field(compare=False, repr=False)
    """The local parameter with this segment."""

    @property
    def layer(self) -> int:
        return self.row.layer

    @property
    def spec(self) -> ParameterSpec:
        return self.row.spec

    @property
    def elements(self) -> tuple[int, str, Box]:
        """What it is: a layer's use of a box of a logical tensor."""
        return self.layer, self.spec.name, self.spec.box


class ParameterBuffer:
    """A rank's parameters in one flat index space, and the tensors of those that it keeps.

    Every local parameter starts at a 64-byte boundary: for small shapes, torch's CPU matrix
    products of unaligned operands differ in the last bits. Local; exact-mode safe.
    """

    def __init__(
        self,
        rows: Sequence[tuple[HeldRow, nn.Parameter]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep: Callable[[Sequence[Segment]], KeptSpans] | None = None,
        filled: bool = True,
        before: ParameterBuffer | None = None,
    ) -> None:
        """Move the parameters into the tensors, or lay out a part of them.

        Args:
            rows: the rows of the rank and their local parameters; those of a layer by part, in the
                order of the tables.
            dtype, device: the type and device of the buffer if the rank holds no parameter.
            keep: returns what is kept of the segments; the parameters then lie elsewhere, and
                `values` is zero. None: all is kept, and the modules work on views of it.
            filled: whether the parameters have values, which are taken over; else they are zero.
            before: a buffer of this rank whose parameters are taken over where they are here as
                well, whole pieces where they lie; not with `keep`.
        """
        self._place: dict[nn.Parameter, tuple[int, int]] = {}
        end = 0
        for _, parameter in rows:
            if parameter not in self._place:
                self._place[parameter] = (end, end + parameter.numel())
                padded = -(-parameter.numel() // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
                end += padded
        if rows and keep is None:
            dtype, device = rows[0][1].dtype, rows[0][1].device
        segments = []
        for row, parameter in rows:
            offset = self._place[parameter][0] + row.spec.local_row * row.spec.row_elements
            segments.append(Segment(row, offset, parameter))
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.whole = KeptSpans([Span(0, end)] if end else [])
        """All elements, padding included."""
        self.kept = self.whole if keep is None else keep(segments)
        pieces = self._pieces() if keep is None else one_piece(self.kept)
        old = None if before is None else before._values
        self._values = FlatValues.zeros(pieces, dtype, device, old)
        for parameter, (start, stop) in self._place.items() if keep is None else ():
            view = self._values.part(start, stop).view(parameter.shape)
            if filled:
                view.copy_(parameter.detach())
            parameter.data = view
        if before is not None:
            self._take_over(before)

    def _pieces(self) -> list[Piece]:
        segments: dict[nn.Parameter, list[Segment]] = {}
        for segment in self.segments:
            segments.setdefault(segment.parameter, []).append(segment)
        starts = [start for start, _ in self._place.values()]
        sizes = [b - a for a, b in pairwise([*starts, self.elements])]
        return pieces_of(
            (tuple(segment.elements for segment in of_one), of_one[0].layer, of_one[0].spec, size)
            for of_one, size in zip(segments.values(), sizes, strict=True)
        )

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What lies in one tensor each."""
        return self._values.pieces

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The kept elements, by piece."""
        return self._values.tensors

    @property
    def values(self) -> Tensor:
        """The kept elements of a buffer that keeps a share."""
        return self._values.one

    @property
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def elements(self) -> int:
        """The length of the flat index space, padding included."""
        return self.whole.elements

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        return self._place.keys()

    def place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The half-open range of the flat index space that `parameter` has."""
        return self._place[parameter]

    def part(self, start: int, stop: int) -> Tensor:
        """The kept parameters [start, stop), of one parameter or neighbours in a piece: a view."""
        return self._values.part(start, stop)

    def parts(self, spans: Iterable[Span]) -> list[Tensor]:
        """The kept parameters of spans, one after another: views."""
        return self._values.parts(spans)

    def _take_over(self, other: ParameterBuffer) -> None:
        """Copy the parameters of another buffer of this rank that are here as well, elsewhere."""
        there = {segment.elements: segment for segment in other.segments}
        for segment in self.segments:
            old = there.get(segment.elements)
            if old is not None and other.kept is other.whole and self.kept is self.whole:
                here, before = self.view(segment), other.view(old)
                if here.data_ptr() != before.data_ptr():
                    here.copy_(before)

    def view(self, segment: Segment) -> Tensor:
        """A segment's parameters, in its shape."""
        values = self.part(segment.offset, segment.offset + segment.spec.elements)
        return values.view(segment.spec.box.shape)

    def kept_rows(
        self, kept: KeptSpans, part: Callable[[int, int], Tensor]
    ) -> Iterator[tuple[Segment, tuple[int, int], Tensor]]:
        """Each run of kept rows of a segment: its rows in the segment, and its values, flat.

        Args:
            kept: the elements of the index space that `part` has, in whole rows.
        """
        for segment in self.segments:
            first, row = segment.offset, segment.spec.row_elements
            for span in kept.within(first, first + segment.spec.elements):
                rows = (span.start - first) // row, (span.stop - first) // row
                yield segment, rows, part(span.start, span.stop)


class OwnedParameters:
    """The parameters of a rank's own blocks: in its buffer, but for its guests.

    Guests are blocks of parts that the rank does not hold. Their places follow the rank's index
    space. Local.
    """

    def __init__(self, buffer: ParameterBuffer, guests: int) -> None:
        """Guests are zero until they are filled.

        Args:
            guests: the number of their elements.
        """
        self._buffer = buffer
        self._guests = torch.zeros(guests, dtype=buffer.dtype, device=buffer.device)

    def part(self, start: int, stop: int) -> Tensor:
        """The parameters [start, stop) of one block, or of neighbours in the buffer: a view."""
        beyond = start - self._buffer.elements
        if beyond >= 0:
            return self._guests[beyond : beyond + stop - start]
        return self._buffer.part(start, stop)

    def parts(self, spans: Sequence[Span]) -> list[Tensor]:
        """The parameters of spans, one after another, all of guests or none: views."""
        if spans[0].start >= self._buffer.elements:
            return [self.part(span.start, span.stop) for span in spans]
        return self._buffer.parts(spans)
