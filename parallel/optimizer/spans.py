"""Ranges of a flat index space, and those of them that a rank keeps. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor


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
