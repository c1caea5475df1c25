"""The read of a box that lies anyhow in a file: few requests, few unneeded bytes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from holdfast.checkpoint.convert.elements.pieces import Location, row_major

SMALLEST_RUN_BYTES = 32 << 10
"""Shorter runs are read together with the bytes between them."""


@dataclass(frozen=True, slots=True)
class Region:
    """The requests for a box, and the place of its elements in memory."""

    requests: tuple[tuple[int, int, int], ...]
    """(byte in the file, byte in memory, length)."""
    strides: tuple[int, ...]
    """The strides of the box in memory, in elements."""
    bytes: int
    """The size of the memory."""
    dense: bool = True
    """Whether exactly the box is read."""

    def is_row_major(self, shape: Sequence[int]) -> bool:
        """Whether the memory then holds exactly the box, in order."""
        return self.dense and all(
            extent == 1 or a == b
            for extent, a, b in zip(shape, self.strides, row_major(shape), strict=True)
        )


def region_of(
    location: Location, shape: Sequence[int], element_bytes: int, most_bytes: int
) -> Region:
    """Plan the read of a box of `shape` that lies at `location`.

    Args:
        most_bytes: the most bytes read together with gaps; a larger region is read run by run.
    """
    elements = prod(shape)
    if not elements:
        return Region((), row_major(shape), 0)
    # From the outermost dimension in the file to the innermost; extents of 1 do not matter.
    order = sorted(
        (d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -location.strides[d]
    )
    run, inner = 1, len(order)
    while inner and location.strides[order[inner - 1]] == run:
        inner -= 1
        run *= shape[order[inner]]
    outer = order[:inner]
    span = 1 + sum((shape[d] - 1) * location.strides[d] for d in order)
    gaps_are_cheap = run * element_bytes < SMALLEST_RUN_BYTES and span * element_bytes <= most_bytes
    if not outer or gaps_are_cheap:
        whole = span * element_bytes
        strides = tuple(location.strides)
        return Region(((location.offset, 0, whole),), strides, whole, dense=span == elements)
    packed = _packed(shape, order)
    length = run * element_bytes
    requests = tuple(
        (
            location.offset + skipped * element_bytes,
            number * length,
            length,
        )
        for number, skipped in enumerate(_starts(shape, location.strides, outer))
    )
    return Region(requests, packed, elements * element_bytes)


def _starts(shape: Sequence[int], strides: Sequence[int], outer: Sequence[int]) -> Iterator[int]:
    """The first element of each run, in the order of the file."""
    for index in product(*(range(shape[d]) for d in outer)):
        yield sum(i * strides[d] for i, d in zip(index, outer, strict=True))


def _packed(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of memory in which the runs follow each other."""
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)
