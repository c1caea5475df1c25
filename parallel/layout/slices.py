"""The slices of a sequence: the parts that are computed as one, and the rank that computes each.

The number of slices is a constant of a run (`train.context_chunks`): whatever runs inside a slice
has one order, and sums between slices do not depend on the ranks that compute them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Slices:
    """The slices of each sequence of a micro-batch, and those that this rank computes."""

    length: int = 0
    """The tokens of a slice; 0: of a whole sequence, which is the only slice."""
    owners: tuple[int, ...] = (0,)
    """The index in the context group of the rank that computes each slice."""
    index: int = 0
    """This rank's index in it."""

    @property
    def count(self) -> int:
        """The number of slices of a sequence."""
        return len(self.owners)

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The slices that this rank computes, ascending."""
        return self.of(self.index)

    def of(self, index: int) -> tuple[int, ...]:
        """The slices that a rank of the context group computes, ascending."""
        return tuple(number for number, owner in enumerate(self.owners) if owner == index)

    def tokens(self, number: int) -> slice:
        """The places of a slice in its sequence."""
        if not self.length:
            return slice(None)
        return slice(number * self.length, (number + 1) * self.length)

    def whole(self) -> Slices:
        """The same slices, all computed by one rank."""
        return Slices(self.length, (0,) * self.count)


def slices_of(seq_len: int, count: int, ranks: int, index: int) -> Slices:
    """The slices of a run, `count` of each sequence, divided among the ranks of a context group.

    The later a slice, the more tokens it attends to. Where slices are at least twice as many as
    ranks, each rank has as many of the last as of the first (Megatron's "zigzag").

    Args:
        count: a multiple of `ranks`.
        index: the rank's index in the group.
    """
    if count == 1:
        return Slices()
    return Slices(seq_len // count, tuple(_owners(count, ranks)), index)


def _owners(count: int, ranks: int) -> Iterator[int]:
    both = 2 * ranks
    for number in range(count):
        if count % both:
            yield number // (count // ranks)
        else:
            block = number // (count // both)
            yield min(block, both - 1 - block)
