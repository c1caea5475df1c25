"""What is to be saved, and the files, chunks and writers that were planned for it: the data of a write plan.

Needs no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.checkpoint.format.files import ELEMENT_BYTES, FileTensor, TensorEntry
from holdfast.parallel.layout import Box


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor and the ranks that can provide it, all with equal bytes."""

    box: Box
    holders: tuple[int, ...]
    apart: tuple[int, ...] = ()
    """Neighbours that differ in this do not lie side by side in their holders' memory."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A logical tensor that is to be saved."""

    name: str
    kind: str
    dtype: str
    """As safetensors names it: "F32", "BF16", …"""
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    """Disjoint, and the whole tensor together."""
    whole: bool
    """Whether it is written as one tensor in the files that Hugging Face loaders open."""

    @property
    def entry(self) -> TensorEntry:
        return TensorEntry(self.kind, self.dtype, self.shape)

    def nbytes(self, box: Box) -> int:
        return box.elements * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """Bytes that one rank writes, contiguous in one file."""

    name: str
    box: Box
    file: str
    offset: int
    length: int
    writer: int
    sources: tuple[Part, ...] = ()
    """Where the bytes come from when no single rank has them: parts of the box, one rank each."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A tensor file that will be written."""

    name: str
    tensors: tuple[FileTensor, ...]
    chunks: tuple[PlannedChunk, ...]
    header_bytes: int
    bytes: int

    @property
    def writers(self) -> tuple[int, ...]:
        return tuple(sorted({chunk.writer for chunk in self.chunks}))

    @property
    def lead(self) -> int:
        """The rank that writes the header and syncs the file, after the others have written."""
        return min(chunk.writer for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """All files of a checkpoint."""

    tensors: Mapping[str, TensorEntry]
    files: tuple[PlannedFile, ...]
    chunk_bytes: int
    _by_rank: dict[int, list[PlannedChunk]] = field(default_factory=dict, compare=False, repr=False)

    def chunks_of(self, rank: int) -> Sequence[PlannedChunk]:
        """What a rank writes, or sends to a writer, in one order on all ranks."""
        if not self._by_rank:
            found: defaultdict[int, list[PlannedChunk]] = defaultdict(list)
            for file in self.files:
                for chunk in file.chunks:
                    for member in {chunk.writer, *(r for p in chunk.sources for r in p.holders)}:
                        found[member].append(chunk)
            self._by_rank.update(found)
        return self._by_rank.get(rank, ())

    def written_by(self, rank: int) -> list[PlannedChunk]:
        """What a rank writes, in the order of the plan."""
        return [chunk for chunk in self.chunks_of(rank) if chunk.writer == rank]

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
            for chunk in file.chunks:
                written[chunk.writer] += chunk.length
        return dict(written)
