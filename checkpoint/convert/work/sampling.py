"""The comparison of a sample: an output's values, read in its own format, against the source's.

Elements are looked up one by one in the pieces of both sides, without the code that converted them.
Local.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from holdfast.checkpoint.convert.elements import (
    Bits,
    BlockScales,
    Location,
    LogicalTensor,
    bits,
    combine,
    number,
)
from holdfast.checkpoint.convert.sources import Catalog, OpenFiles
from holdfast.checkpoint.format import ELEMENT_BYTES
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import open_descriptor

MOST_ELEMENTS = 4096


def compare_sample(
    source: Path,
    expected: Sequence[tuple[LogicalTensor, str]],
    output: Catalog,
    added: Collection[str] = (),
    scales: BlockScales | None = None,
) -> int:
    """Compare names, shapes, types and a sample of elements. Returns the number of elements.

    Args:
        source: the folder that the locations of the expected tensors are relative to.
        expected: the tensors that should be there, each with its type in the output.
        added: the names of tensors that only the output has.
        scales: the scales of the source's 8-bit elements that become wider.
    Raises:
        CheckpointError: a tensor is missing, or differs in form or value.
    """
    found = {tensor.full_name: tensor for tensor in output.tensors}
    names = [tensor.full_name for tensor, _ in expected]
    missing = sorted((set(names) | set(added)) ^ set(found))
    if missing:
        raise CheckpointError(f"{output.root}: {missing[0]} is in one of source and output only")
    each = max(2, min(16, MOST_ELEMENTS // max(1, len(names))))
    sampled: list[tuple[LogicalTensor, str, tuple[int, ...], list[Location], list[Location]]] = []
    with _Elements(source) as there, _Elements(output.root) as here:
        for tensor, dtype in expected:
            written = found[tensor.full_name]
            if (written.shape, written.dtype) != (tensor.shape, dtype):
                raise CheckpointError(
                    f"{output.root}: {tensor.full_name} is {written.dtype} {list(written.shape)} "
                    f"and should be {dtype} {list(tensor.shape)}"
                )
            for index in _indices(tensor, each):
                locations = there.find(tensor, index), here.find(written, index)
                sampled.append((tensor, dtype, index, *locations))
        for tensor, dtype, index, sources, outputs in sampled:
            wanted = there.value(tensor, sources, dtype, scales or BlockScales())
            for location in outputs:
                value = here.read(location, dtype).tobytes()
                if wanted != value:
                    raise CheckpointError(
                        f"{output.root}: {tensor.full_name}{list(index)} is {number(value, dtype)} "
                        f"and should be {number(wanted, dtype)}"
                    )
    return len(sampled)


def _indices(tensor: LogicalTensor, count: int) -> set[tuple[int, ...]]:
    """The first element, the last, and some between, the same ones each time."""
    if 0 in tensor.shape:
        return set()
    draw = random.Random(tensor.full_name)
    ends = {tuple(0 for _ in tensor.shape), tuple(n - 1 for n in tensor.shape)}
    return ends | {tuple(draw.randrange(n) for n in tensor.shape) for _ in range(count - 2)}


def _opened(path: str) -> int:
    return open_descriptor(Path(path), os.O_RDONLY)


class _Elements:
    """A reader of single elements of a checkpoint's tensors."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = OpenFiles(root, _opened, os.close)

    def __enter__(self) -> _Elements:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def find(self, tensor: LogicalTensor, index: tuple[int, ...]) -> list[Location]:
        """The locations of an element; the disk is asked for all of them first."""
        for piece in tensor.pieces:
            if all(
                a <= i < b for a, i, b in zip(piece.box.start, index, piece.box.stop, strict=True)
            ):
                inside = tuple(i - a for i, a in zip(index, piece.box.start, strict=True))
                locations = [
                    location.at(inside, tensor.element_bytes) for location in piece.locations
                ]
                for location in locations:
                    size = tensor.element_bytes
                    handle = self._files[location.file]
                    os.posix_fadvise(handle, location.offset, size, os.POSIX_FADV_WILLNEED)
                return locations
        raise CheckpointError(f"{self._root}: nothing holds {tensor.full_name}{list(index)}")

    def value(
        self,
        tensor: LogicalTensor,
        locations: Sequence[Location],
        dtype: str,
        scales: BlockScales,
    ) -> bytes:
        """The bytes of an element at `locations`, in type `dtype`."""
        values = [self.read(location, tensor.dtype) for location in locations]
        if not values:
            return bytes(ELEMENT_BYTES[dtype])
        if tensor.combine == "equal":
            one = Location(locations[0].file, locations[0].offset, (1,))
            return scales.cast(values[0], tensor.dtype, dtype, one).tobytes()
        return combine(values, tensor.dtype, dtype, mean=tensor.combine == "mean").tobytes()

    def read(self, location: Location, dtype: str) -> Bits:
        """The element of type `dtype` at a location."""
        size = ELEMENT_BYTES[dtype]
        content = os.pread(self._files[location.file], size, location.offset)
        if len(content) != size:
            raise CheckpointError(
                f"{self._root / location.file} ends before byte {location.offset + size}"
            )
        return bits(np.frombuffer(content, np.uint8), dtype)
