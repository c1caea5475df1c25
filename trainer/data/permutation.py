"""The order of samples: a fresh keyed permutation per epoch, computed point by point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast import _native
from holdfast.parallel.keyed_random import stream_key


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """A bijection of 0..size-1 for every epoch, keyed by (seed, name, epoch).

    Nothing is stored and nothing is shuffled: any position of any epoch costs the same, so a
    resumed run needs only the number of the sample.

    Attributes:
        size: the number of items, at least 1.
        seed: the seed of the run's data.
        name: distinguishes the orders of one seed: split and corpus.
    """

    size: int
    seed: int
    name: str

    def item(self, index: int) -> int:
        """The item at position `index` ≥ 0 of the endless sequence of epochs."""
        epoch, position = divmod(index, self.size)
        return _native.permute_index(position, self.size, self._key(epoch))

    def items(self, start: int, count: int) -> np.ndarray:
        """The items at positions start..start+count-1: int64[count]."""
        found = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, position = divmod(start + done, self.size)
            part = found[done : done + self.size - position]
            _native.permute_indices(
                part.ctypes.data, position, len(part), self.size, self._key(epoch)
            )
            done += len(part)
        return found

    def _key(self, epoch: int) -> int:
        return stream_key(self.seed, "data order", self.name, epoch).key
