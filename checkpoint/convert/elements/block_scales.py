"""The scales of 8-bit weights: one number per block of a matrix, by which its elements count.

Each product is made in 32 bits and rounded once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.checkpoint.convert.elements.arrays import Bits, cast
from holdfast.checkpoint.convert.elements.pieces import Location

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
"""The types of elements that scales belong to, each of one byte."""


@dataclass(frozen=True, slots=True)
class BlockScale:
    """The scales of a box of a matrix that lies in a file, row by row."""

    file: str
    offset: int
    """The first byte of the box."""
    end: int
    """The byte after its last."""
    start: tuple[int, int]
    """The row and column of the matrix at which the box begins."""
    stride: int
    """The bytes between two rows of the box."""
    block: tuple[int, int]
    """The rows and columns that share a scale."""
    values: NDArray[np.float32]
    """float32[blocks of rows, blocks of columns]."""

    def factors(self, location: Location, shape: Sequence[int]) -> NDArray[np.float32]:
        """The scale of each element of a box of any shape that lies at `location`: float32."""
        at = np.full((1,) * len(shape), location.offset - self.offset, np.int64)
        for dim, (extent, stride) in enumerate(zip(shape, location.strides, strict=True)):
            steps = np.arange(extent, dtype=np.int64) * stride
            at = at + steps.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        rows = at // self.stride
        columns = at - rows * self.stride
        rows = (rows + self.start[0]) // self.block[0]
        return self.values[rows, (columns + self.start[1]) // self.block[1]]


class BlockScales:
    """The scales of a source, found by the place of elements in its files."""

    def __init__(self, scales: Iterable[BlockScale] = ()) -> None:
        self._by_file: defaultdict[str, list[BlockScale]] = defaultdict(list)
        for scale in sorted(scales, key=lambda one: one.offset):
            self._by_file[scale.file].append(scale)

    def __len__(self) -> int:
        return sum(map(len, self._by_file.values()))

    def at(self, location: Location) -> BlockScale | None:
        """The scales of the elements at a location; None where there are none."""
        found = self._by_file.get(location.file, ())
        number = bisect_right(found, location.offset, key=lambda one: one.offset) - 1
        if number < 0 or location.offset >= found[number].end:
            return None
        return found[number]

    def cast(self, values: Bits, source: str, target: str, location: Location) -> Bits:
        """Cast elements at a location to another type, times their scales if they have any."""
        scale = self.at(location) if source in EIGHT_BITS and target != source else None
        if scale is None:
            return cast(values, source, target)
        wide = cast(values, source, "F32").view(np.float32)
        product = wide * scale.factors(location, values.shape)
        return cast(product.view(np.uint32), "F32", target)
