"""The places of one rank's parameters in one flat index space, so that spans of blocks travel
without packing, and the elements of it that the rank keeps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from holdfast.parallel.layout import Box, HeldRow, ParameterSpec

ALIGNMENT_ELEMENTS = 64
"""Local parameters start at multiples of this: 64 bytes or more for every dtype in use."""


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of a rank's flat index space."""

    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same elements in the same order, neighbouring spans joined. Pure."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].stop == span.start:
            found[-1] = Span(found[-1].start, span.stop)
        else:
            found.append(span)
    return tuple(found)


class KeptSpans:
    """The elements of a flat index space that a rank keeps, one after another in a flat tensor."""

    def __init__(self, spans: Iterable[Span]) -> None:
        """From disjoint spans in ascending order."""
        self.spans = joined(spans)
        ends = list(accumulate((span.elements for span in self.spans), initial=0))
        self.elements = ends[-1]
        """The length of the tensor."""
        self._starts = [span.start for span in self.spans]
        self._shifts = [span.start - end for span, end in zip(self.spans, ends[:-1], strict=True)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeptSpans) and self.spans == other.spans

    def __hash__(self) -> int:
        return hash(self.spans)

    def has(self, start: int, stop: int) -> bool:
        """Whether the elements [start, stop) are all kept."""
        return next(self.within(start, stop), None) == Span(start, stop)

    def of(self, values: Tensor, start: int, stop: int) -> Tensor:
        """The kept elements [start, stop) in the tensor `values`: a view.

        Raises:
            ValueError: they are not all kept.
        """
        place = bisect_right(self._starts, start) - 1
        if place < 0 or stop > self.spans[place].stop:
            raise ValueError(f"elements {start} to {stop} are not kept here")
        shift = self._shifts[place]
        return values[start - shift : stop - shift]

    def run(self, values: Tensor, spans: Sequence[Span]) -> Tensor:
        """Kept spans that follow each other in the tensor `values`: a view of them all.

        Raises:
            ValueError: they do not.
        """
        first, last = (self.of(values, s.start, s.stop) for s in (spans[0], spans[-1]))
        start, stop = first.storage_offset(), last.storage_offset() + last.numel()
        if stop - start != sum(span.elements for span in spans):
            raise ValueError("the spans do not follow each other")
        start -= values.storage_offset()
        return values[start : start + sum(span.elements for span in spans)]

    def within(self, start: int, stop: int) -> Iterator[Span]:
        """The kept parts of [start, stop), in ascending order."""
        for span in self.spans[max(0, bisect_right(self._starts, start) - 1) :]:
            if span.start >= stop:
                return
            if span.stop > start:
                yield Span(max(start, span.start), min(stop, span.stop))


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
    """A rank's parameters in one flat index space, and the tensor of those that it keeps.

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
    ) -> None:
        """Move the parameters into the tensor, or lay out a part of them.

        Args:
            rows: the rows of the rank and their local parameters; those of a layer by part, in the
                order of the tables.
            dtype, device: the type and device of the buffer if the rank holds no parameter.
            keep: returns what is kept of the segments; the parameters then lie elsewhere, and
                `values` is zero. None: all is kept, and the modules work on views of it.
            filled: whether the parameters have values, which are taken over; else they are zero.
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
        self.values: Tensor = torch.zeros(self.kept.elements, dtype=dtype, device=device)
        """The kept elements."""
        for parameter, (start, stop) in self._place.items() if keep is None else ():
            view = self.values[start:stop].view(parameter.shape)
            if filled:
                view.copy_(parameter.detach())
            parameter.data = view

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
        """The kept parameters [start, stop): a view of `values`."""
        return self.kept.of(self.values, start, stop)

    def take_over(self, other: ParameterBuffer) -> None:
        """Take the parameters of another buffer of this rank that are here as well."""
        there = {segment.elements: segment for segment in other.segments}
        for segment in self.segments:
            old = there.get(segment.elements)
            if old is not None and other.kept is other.whole and self.kept is self.whole:
                self.view(self.values, segment).copy_(other.view(other.values, old))

    def view(self, values: Tensor, segment: Segment) -> Tensor:
        """The segment's part of a flat tensor of all elements, in the segment's shape."""
        stop = segment.offset + segment.spec.elements
        return values[segment.offset : stop].view(segment.spec.box.shape)

    def kept_rows(
        self, kept: KeptSpans, values: Tensor
    ) -> Iterator[tuple[Segment, tuple[int, int], Tensor]]:
        """Each run of kept rows of a segment: its rows in the segment, and its values, flat.

        Args:
            kept: what the tensor `values` has of the index space, in whole rows.
        """
        for segment in self.segments:
            first, row = segment.offset, segment.spec.row_elements
            for span in kept.within(first, first + segment.spec.elements):
                rows = (span.start - first) // row, (span.stop - first) // row
                yield segment, rows, kept.of(values, span.start, span.stop)


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
        self._guests = torch.zeros(guests, dtype=buffer.values.dtype, device=buffer.values.device)

    def part(self, start: int, stop: int) -> Tensor:
        """The parameters [start, stop) of one block, or of neighbours in the buffer: a view."""
        beyond = start - self._buffer.elements
        if beyond >= 0:
            return self._guests[beyond : beyond + stop - start]
        return self._buffer.part(start, stop)
