"""The order of samples: a fresh keyed permutation per epoch, computed point by point."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast import _native
from holdfast.parallel.keyed_random import stream_key


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """A bijection of 0..size-1 for every epoch, keyed by (seed, name, epoch).

    Nothing is stored and nothing is shuffled: any position of any epoch costs the same, so that
    resuming needs only the number of the sample.

    Attributes:
        size: number of items, at least 1.
        seed: of the run's data.
        name: tells apart the orders of one seed: split and corpus.
    """

    size: int
    seed: int
    name: str

    def item(self, index: int) -> int:
        """The item at place `index` ≥ 0 of the endless sequence of epochs."""
        epoch, position = divmod(index, self.size)
        key = stream_key(self.seed, "data order", self.name, epoch).key
        return _native.permute_index(position, self.size, key)
