"""The output of a conversion: files, the units of work that fill them, and the finishing touches.

Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from holdfast.checkpoint.convert.elements.pieces import LogicalTensor
from holdfast.checkpoint.format import ELEMENT_BYTES
from holdfast.parallel.layout import Box

Checksum = Literal["crc32c", "crc32"]
UNIT_BYTES = 8 << 20
FLOATS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
"""The types that a conversion may change, and their bits."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A box of a tensor, contiguous in an output file: the unit of reading and writing."""

    tensor: LogicalTensor
    box: Box
    dtype: str
    """The element type in the output."""
    file: str
    offset: int

    @property
    def bytes(self) -> int:
        return self.box.elements * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Output:
    """The whole output of a conversion."""

    files: dict[str, int]
    """The size of each file in bytes, by name."""
    units: Sequence[Unit]
    finish: Callable[[Path, Sequence[int]], None]
    """Writes everything that depends on checksums (headers, indices, small files). Takes the folder
    and the checksum of each unit."""
    expected: Sequence[tuple[LogicalTensor, str]]
    """The tensors that the output's own format must find in it, each with its type."""
    checksum: Checksum = "crc32c"
    added: frozenset[str] = frozenset()
    """The full names of tensors that the source lacks, such as a step count per parameter."""

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def rounded(self) -> Counter[tuple[str, str]]:
        """The number of tensors that change their type, by (source's type, output's type)."""
        changed = ((t.dtype, out) for t, out in self.expected if t.dtype != out)
        return Counter(changed)


def row_boxes(box: Box, element_bytes: int, unit_bytes: int = UNIT_BYTES) -> Iterator[Box]:
    """Cut a box into contiguous boxes of at most `unit_bytes`, or of one row of its last dims."""
    if not box.start or not box.elements:
        yield box
        return
    row_bytes = prod(box.shape[1:]) * element_bytes
    if row_bytes > unit_bytes and len(box.start) > 1:
        inner = Box(box.start[1:], box.stop[1:])
        for index in range(box.start[0], box.stop[0]):
            for part in row_boxes(inner, element_bytes, unit_bytes):
                yield Box((index, *part.start), (index + 1, *part.stop))
        return
    rows = max(1, unit_bytes // row_bytes)
    for start in range(box.start[0], box.stop[0], rows):
        stop = min(box.stop[0], start + rows)
        yield Box((start, *box.start[1:]), (stop, *box.stop[1:]))


def units_of(tensor: LogicalTensor, box: Box, dtype: str, file: str, offset: int) -> Iterator[Unit]:
    """The units of a row-major box that begins at byte `offset` of a file."""
    for rows in row_boxes(box, ELEMENT_BYTES[dtype]):
        unit = Unit(tensor, rows, dtype, file, offset)
        offset += unit.bytes
        if unit.bytes:
            yield unit
