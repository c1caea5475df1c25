"""The slices of a sequence: the parts that are computed as one, and the rank that computes each.

The number of slices is a constant of a run (`train.context_chunks`): whatever runs inside a slice
has one order, and sums between slices do not depend on the ranks that compute them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple


class GradientMark(NamedTuple):
    """What a gradient is of."""

    tokens: int
    """How many of a product's tokens, which follow one another."""
    unit: int = 0
    """The number of the gradient in its micro-batch."""
    micro_batch: int | None = None
    """None: the one whose gradients are being computed."""


SliceKey = tuple[int, int]
"""A micro-batch, and a slice of it."""


class SharePlace(NamedTuple):
    """Which of the equal shares of a slice's tokens a rank has."""

    place: int
    shares: int


class LostGradient(NamedTuple):
    """A gradient of an expert's matrices from a slice, which no rank's sums include any more."""

    layer: int
    key: SliceKey
    expert: int
    sources: tuple[int, ...]
    """The members of the expert's team that have the slice's tokens, in the order of these."""
    host: int
    """The member that adds it to its sums."""


@dataclass(frozen=True)
class Slices:
    """The slices of each sequence of a micro-batch, and those that this rank computes."""

    length: int = 0
    """The tokens of a slice; 0: of a whole sequence, which is the only slice."""
    owners: tuple[int, ...] = (0,)
    """The index in the context group of the rank that computes each slice."""
    index: int = 0
    """This rank's index in it."""
    only: range | None = None
    """The slices of the stretch that is computed; None: all of them."""

    @property
    def count(self) -> int:
        """The number of slices of a sequence."""
        return len(self.owners)

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The slices that this rank computes, ascending."""
        return self.of(self.index)

    @property
    def numbers(self) -> range:
        """The slices that the ranks of the context group compute: all, or those of a stretch."""
        return range(self.count) if self.only is None else self.only

    def of(self, index: int) -> tuple[int, ...]:
        """The slices that a rank of the context group computes, ascending."""
        return tuple(number for number in self.numbers if self.owners[number] == index)

    def stretch(self, number: int, stretches: int) -> Slices:
        """The same slices, of which one of so many equal stretches is computed."""
        length = self.count // stretches
        return replace(self, only=range(number * length, (number + 1) * length))

    def tokens(self, number: int) -> slice:
        """The places of a slice in its sequence."""
        if not self.length:
            return slice(None)
        return slice(number * self.length, (number + 1) * self.length)

    def whole(self) -> Slices:
        """The same slices, all computed by one rank."""
        return Slices(self.length, (0,) * self.count, only=self.only)


def slices_of(seq_len: int, count: int, ranks: int, index: int, stretches: int = 1) -> Slices:
    """The slices of a run, `count` of each sequence, divided among the ranks of a context group.

    The later a slice, the more tokens it attends to. Where slices are at least twice as many as
    ranks, each rank has as many of the last as of the first (Megatron's "zigzag"), of each stretch.

    Args:
        count: a multiple of `ranks` times `stretches`.
        index: the rank's index in the group.
        stretches: the equal parts of a sequence of which each is divided so.
    """
    if count == 1:
        return Slices()
    owners = tuple(_owners(count // stretches, ranks)) * stretches
    return Slices(seq_len // count, owners, index)


def _owners(count: int, ranks: int) -> Iterator[int]:
    both = 2 * ranks
    for number in range(count):
        if count % both:
            yield number // (count // ranks)
        else:
            block = number // (count // both)
            yield min(block, both - 1 - block)
