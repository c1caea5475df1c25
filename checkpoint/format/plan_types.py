"""The types of a write plan: tensors of a save, files, pieces and writers. Needs no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.checkpoint.format.files import ELEMENT_BYTES, FileTensor, TensorEntry
from holdfast.parallel.layout import Box


@dataclass(frozen=True, slots=True)
class HeldBox:
    """A box of a tensor and the ranks that can provide it, all with equal bytes."""

    box: Box
    holders: tuple[int, ...]
    """The ranks. Those at one place of neighbouring columns are best one group that lies near."""
    apart: tuple[int, ...] = ()
    """Neighbouring boxes that differ in this value lie apart in their holders' memory."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A logical tensor of a save."""

    name: str
    kind: str
    dtype: str
    """The name of the element type in safetensors: "F32", "BF16", …"""
    shape: tuple[int, ...]
    parts: tuple[HeldBox, ...]
    """Disjoint boxes that together are the whole tensor."""
    whole: bool
    """Whether the tensor is written whole, into the files that Hugging Face loaders open."""

    @property
    def entry(self) -> TensorEntry:
        return TensorEntry(self.kind, self.dtype, self.shape)

    def nbytes(self, box: Box) -> int:
        return box.elements * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlannedPiece:
    """A piece: bytes that one rank writes, contiguous in one file."""

    name: str
    box: Box
    file: str
    offset: int
    length: int
    writer: int
    sources: tuple[HeldBox, ...] = ()
    """The sources of the bytes when no single rank has them all: parts of the box, one rank
    each."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A tensor file that will be written."""

    name: str
    tensors: tuple[FileTensor, ...]
    pieces: tuple[PlannedPiece, ...]
    header_bytes: int
    bytes: int

    @property
    def writers(self) -> tuple[int, ...]:
        return tuple(sorted({piece.writer for piece in self.pieces}))

    @property
    def lead(self) -> int:
        """The rank that writes the header and syncs the file, after the others have written."""
        return min(piece.writer for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """All files of a checkpoint."""

    tensors: Mapping[str, TensorEntry]
    files: tuple[PlannedFile, ...]
    piece_bytes: int
    _by_rank: dict[int, list[PlannedPiece]] = field(default_factory=dict, compare=False, repr=False)

    def pieces_of(self, rank: int) -> Sequence[PlannedPiece]:
        """The pieces that a rank writes, or sends to a writer, in one order on all ranks."""
        if not self._by_rank:
            found: defaultdict[int, list[PlannedPiece]] = defaultdict(list)
            for file in self.files:
                for piece in file.pieces:
                    for member in {piece.writer, *(r for p in piece.sources for r in p.holders)}:
                        found[member].append(piece)
            self._by_rank.update(found)
        return self._by_rank.get(rank, ())

    def written_by(self, rank: int) -> list[PlannedPiece]:
        """The pieces that a rank writes, in the order of the plan."""
        return [piece for piece in self.pieces_of(rank) if piece.writer == rank]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def imbalance(self, ranks: int) -> float:
        """The bytes of the rank that writes most, over the mean of all ranks."""
        written = self.written_bytes()
        return max(written.values(), default=0) * ranks / max(1, sum(written.values()))

    def written_bytes(self) -> dict[int, int]:
        """The bytes of tensors by writing rank."""
        written: defaultdict[int, int] = defaultdict(int)
        for file in self.files:
            for piece in file.pieces:
                written[piece.writer] += piece.length
        return dict(written)
