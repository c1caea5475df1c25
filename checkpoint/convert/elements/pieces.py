"""The places of tensor elements in files: boxes, each with an affine map to bytes.

A location is an offset and a stride per dimension. That describes every tensor that a conversion
between frameworks meets: cut, fused, interleaved, stacked, transposed and flattened tensors are all
boxes with locations (after the pieces of DeepSpeed's affine maps). Nothing is copied before a box
of the output is made. Pure; needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from holdfast.checkpoint.format import ELEMENT_BYTES, full_name
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box, without


@dataclass(frozen=True, slots=True)
class Location:
    """The place of a box: element i is at byte `offset` + sum(i[d] * strides[d]) * element size."""

    file: str
    """The file's path, relative to the folder of the source."""
    offset: int
    strides: tuple[int, ...]
    """The stride of each dimension of the box, in elements."""

    def at(self, start: Sequence[int], element_bytes: int) -> Location:
        """The location of the box that begins at index `start` of this one."""
        skipped = sum(i * stride for i, stride in zip(start, self.strides, strict=True))
        return Location(self.file, self.offset + skipped * element_bytes, self.strides)


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """A box of a tensor and the locations that hold it; without locations it is zeros."""

    box: Box
    locations: tuple[Location, ...]

    def part(self, box: Box, element_bytes: int) -> SourcePiece:
        """The part of this piece in a smaller box."""
        start = box.relative_to(self.box).start
        return SourcePiece(
            box, tuple(location.at(start, element_bytes) for location in self.locations)
        )


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """A record of a zip archive."""

    name: str
    crc32: int


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor as a source keeps it, or one shard of it."""

    key: str
    """The tensor's name in the source."""
    dtype: str
    """The element type, by safetensors' name."""
    shape: tuple[int, ...]
    pieces: tuple[SourcePiece, ...]
    shard: tuple[tuple[str, int], ...] = ()
    """The coordinates among the source's shards, such as (("tp", 1), ("pp", 0))."""
    full_shape: tuple[int, ...] | None = None
    """The shape of the whole tensor, if this is a flat fragment of one."""
    records: Mapping[tuple[str, int, int], ZipRecord] = field(default_factory=dict)
    """The zip records of byte ranges that are exactly a piece, by (file, byte, length)."""

    def index(self, axis: str) -> int:
        """The shard's coordinate along an axis; 0 along an axis that does not cut the tensor."""
        return dict(self.shard).get(axis, 0)

    @property
    def label(self) -> str:
        """The key with the shard's coordinates, for messages."""
        coordinates = ", ".join(f"{axis} {index}" for axis, index in self.shard)
        return f"{self.key} ({coordinates})" if coordinates else self.key


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor of the model, and the source of its elements."""

    name: str
    """The name without the kind."""
    kind: str
    """The kind, as in `TensorEntry`."""
    dtype: str
    """The element type in the source."""
    shape: tuple[int, ...]
    pieces: tuple[SourcePiece, ...]
    combine: str = "equal"
    """How the locations of a piece combine: "equal" (all hold the same bytes), "sum" or "mean"."""

    @property
    def full_name(self) -> str:
        """The tensor's name in a checkpoint's lists."""
        return full_name(self.kind, self.name)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.element_bytes

    def within(self, box: Box) -> Iterator[SourcePiece]:
        """The pieces that make up a box of the tensor."""
        first, last = (box.start[0], box.stop[0]) if box.start else (0, 0)
        for piece in self.pieces:
            # A tensor of many layers has many pieces; most can be ruled out at once.
            if piece.box.start and (piece.box.start[0] >= last or piece.box.stop[0] <= first):
                continue
            common = piece.box if not piece.box.start else piece.box.intersect(box)
            if common is not None:
                yield piece.part(common, self.element_bytes)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor without gaps."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def stored(
    key: str,
    dtype: str,
    shape: Sequence[int],
    file: str,
    offset: int,
    *,
    strides: Sequence[int] | None = None,
    shard: tuple[tuple[str, int], ...] = (),
    full_shape: tuple[int, ...] | None = None,
) -> SourceTensor:
    """A source tensor that lies in one piece at byte `offset` of a file."""
    location = Location(file, offset, tuple(row_major(shape) if strides is None else strides))
    shape = tuple(shape)
    return SourceTensor(
        key, dtype, shape, (SourcePiece(Box.whole(shape), (location,)),), shard, full_shape
    )


def flat_boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """The boxes, in order, that make up a range of a row-major tensor's elements.

    There are at most 2 * dimensions - 1 boxes, each contiguous.
    """
    if not shape:
        if start < stop:
            yield Box((), ())
        return
    row = prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        if inside or stop - start < row:
            end = min(stop, (index + 1) * row)
            for box in flat_boxes(inside, inside + end - start, shape[1:]):
                yield Box((index, *box.start), (index + 1, *box.stop))
        else:
            rows = (stop - start) // row
            end = start + rows * row
            yield Box((index, *(0,) * (len(shape) - 1)), (index + rows, *shape[1:]))
        start = end


def fragment_pieces(
    fragment: SourceTensor, start: int, shape: Sequence[int]
) -> Iterator[SourcePiece]:
    """The pieces of a tensor that a flat fragment has; its first element is element `start`.

    Elements beyond the tensor's end are padding.
    """
    size, strides = ELEMENT_BYTES[fragment.dtype], row_major(shape)
    total = prod(shape)
    for piece in fragment.pieces:
        first = start + piece.box.start[0]
        last = min(total, start + piece.box.stop[0])
        for box in flat_boxes(first, last, shape):
            skipped = sum(i * s for i, s in zip(box.start, strides, strict=True)) - first
            locations = tuple(
                Location(location.file, location.offset + skipped * size, strides)
                for location in piece.locations
            )
            yield SourcePiece(box, locations)


def overlay(
    first: Sequence[SourcePiece], second: Sequence[SourcePiece], element_bytes: int
) -> list[SourcePiece]:
    """The pieces of a tensor that two sources provide, with the locations of both."""
    both = []
    for one in first:
        for other in second:
            common = one.box if not one.box.start else one.box.intersect(other.box)
            if common is None:
                continue
            a, b = one.part(common, element_bytes), other.part(common, element_bytes)
            both.append(SourcePiece(common, a.locations + b.locations))
    return both


def moved(pieces: Sequence[SourcePiece], dim: int, distance: int) -> list[SourcePiece]:
    """The pieces, moved by `distance` indices along `dim`."""

    def shift(index: tuple[int, ...]) -> tuple[int, ...]:
        return (*index[:dim], index[dim] + distance, *index[dim + 1 :])

    return [
        replace(piece, box=Box(shift(piece.box.start), shift(piece.box.stop))) for piece in pieces
    ]


def check_complete(tensor: LogicalTensor) -> None:
    """Check that the pieces hold each element exactly once.

    Raises:
        CheckpointError: there is a hole, an overlap or a piece outside the tensor; the message
            names it.
    """
    whole = Box.whole(tensor.shape)
    for piece in tensor.pieces:
        if len(piece.box.start) != len(tensor.shape) or not whole.contains(piece.box):
            raise CheckpointError(
                f"{tensor.full_name}: the source has {piece.box}, outside of its shape "
                f"{list(tensor.shape)}"
            )
    boxes = sorted((piece.box for piece in tensor.pieces), key=lambda box: box.start)
    held = sum(box.elements for box in boxes)
    holes = without([whole], boxes)
    if holes:
        missing = sum(hole.elements for hole in holes)
        raise CheckpointError(
            f"{tensor.full_name}: the source lacks {holes[0]} of its shape {list(tensor.shape)} "
            f"({missing} elements in all); a shard or a file of it is missing"
        )
    if held != whole.elements:
        raise CheckpointError(
            f"{tensor.full_name}: parts of the source overlap ({held} elements for a shape of "
            f"{list(tensor.shape)}); each element must be in one part"
        )
