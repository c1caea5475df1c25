"""The data of a write plan: the tensors of a save, and their files, pieces and writers.

Needs no torch.
"""

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
    apart: tuple[int, ...] = ()
    """Neighbours that differ in this lie apart in their holders' memory."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A logical tensor of a save."""

    name: str
    kind: str
    dtype: str
    """As safetensors names it: "F32", "BF16", …"""
    shape: tuple[int, ...]
    parts: tuple[HeldBox, ...]
    """Disjoint, and the whole tensor together."""
    whole: bool
    """Whether it is written as one tensor in the files that Hugging Face loaders open."""

    @property
    def entry(self) -> TensorEntry:
        return TensorEntry(self.kind, self.dtype, self.shape)

    def nbytes(self, box: Box) -> int:
        return box.elements * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlannedPiece:
    """Bytes that one rank writes, contiguous in one file."""

    name: str
    box: Box
    file: str
    offset: int
    length: int
    writer: int
    sources: tuple[HeldBox, ...] = ()
    """Where the bytes come from when no single rank has them: parts of the box, one rank each."""


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
        """What a rank writes, or sends to a writer, in one order on all ranks."""
        if not self._by_rank:
            found: defaultdict[int, list[PlannedPiece]] = defaultdict(list)
            for file in self.files:
                for piece in file.pieces:
                    for member in {piece.writer, *(r for p in piece.sources for r in p.holders)}:
                        found[member].append(piece)
            self._by_rank.update(found)
        return self._by_rank.get(rank, ())

    def written_by(self, rank: int) -> list[PlannedPiece]:
        """What a rank writes, in the order of the plan."""
        return [piece for piece in self.pieces_of(rank) if piece.writer == rank]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def imbalance(self, ranks: int) -> float:
        """Bytes of the rank that writes most over the mean of all ranks."""
        written = self.written_bytes()
        return max(written.values(), default=0) * ranks / max(1, sum(written.values()))

    def written_bytes(self) -> dict[int, int]:
        """Tensor bytes by writing rank."""
        written: defaultdict[int, int] = defaultdict(int)
        for file in self.files:
            for piece in file.pieces:
                written[piece.writer] += piece.length
        return dict(written)
