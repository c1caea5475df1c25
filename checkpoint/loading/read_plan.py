"""The read plan: which rank of a node reads which pieces, and which ranks get their boxes. Pure.

A piece that some rank of the node needs is read once, whole, so that it can be checked. Its boxes
are then handed to the ranks that want them. `transfers` computes the moves: pieces hold the source
layout, ranks the target layout. Needs no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.checkpoint.format import (
    ALIGNMENT,
    ELEMENT_BYTES,
    FileEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
)
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box, Layout, covers, transfers


@dataclass(frozen=True, slots=True)
class Delivery:
    """A box that one rank takes out of a piece."""

    rank: int
    box: Box


@dataclass(frozen=True, slots=True)
class PieceRead:
    """A piece that one rank reads, and the boxes that ranks take out of it."""

    name: str
    dtype: str
    file: str
    piece: PieceEntry
    deliveries: tuple[Delivery, ...]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """The loads of the ranks of one node, by reading rank, in order: at most `load_bytes` each."""

    loads: Mapping[int, tuple[tuple[PieceRead, ...], ...]]
    load_bytes: int

    @property
    def bytes(self) -> int:
        """The bytes that the node reads from storage."""
        return sum(
            read.piece.length for loads in self.loads.values() for load in loads for read in load
        )

    @property
    def memory_bytes(self) -> int:
        """The size of the largest load, with the gaps that direct reads need."""
        return max(
            (requests_of(load)[2] for loads in self.loads.values() for load in loads), default=0
        )

    @property
    def rounds(self) -> int:
        return max(map(len, self.loads.values()), default=0)

    def receivers(self, reader: int, number: int) -> frozenset[int]:
        """The ranks that take boxes out of a load."""
        return frozenset(d.rank for read in self.loads[reader][number] for d in read.deliveries)


def fits(piece: PieceEntry, tensor: TensorEntry, file: FileEntry) -> bool:
    """Whether a piece has the bytes of its box, and they lie in its file after the header."""
    return (
        piece.length == piece.box.elements * ELEMENT_BYTES[tensor.dtype]
        and piece.offset >= file.header_bytes
        and piece.offset + piece.length <= file.bytes
    )


def check_coverage(manifest: Manifest, where: str) -> None:
    """Check that the pieces of a manifest make up every tensor, each element once.

    Raises:
        CheckpointError: a tensor has a hole or an overlap, or a piece lies outside it; the message
            names it.
    """
    held: defaultdict[str, int] = defaultdict(int)
    for file, entry in manifest.files.items():
        for name, pieces in entry.pieces.items():
            tensor = manifest.tensors.get(name)
            if tensor is None or tensor.dtype not in ELEMENT_BYTES:
                raise CheckpointError(
                    f"{where}: {file} holds {name}, which the manifest does not list"
                )
            for piece in pieces:
                held[name] += piece.box.elements
                if not fits(piece, tensor, entry):
                    raise CheckpointError(
                        f"{where}: the piece of {name} at byte {piece.offset} of {file} does not "
                        f"fit its box {piece.box} or its file"
                    )
    try:
        covers(manifest.specs(), manifest.layout())
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    for name, tensor in manifest.tensors.items():
        if held[name] != Box.whole(tensor.shape).elements:
            raise CheckpointError(f"{where}: pieces of {name} overlap; each element must be in one")


def make_read_plan(
    manifest: Manifest,
    wanted: Mapping[int, Mapping[str, Sequence[Box]]],
    *,
    load_bytes: int,
    where: str = "checkpoint",
) -> ReadPlan:
    """Plan what the ranks of one node read. Pure.

    Args:
        wanted: the boxes that each rank of the node needs, by rank and tensor.
        load_bytes: the bytes read and handed on at a time; one piece at least.
    Raises:
        CheckpointError: the checkpoint lacks a tensor or a box.
    """
    names = {name for boxes in wanted.values() for name in boxes}
    missing = sorted(names - manifest.tensors.keys())
    if missing:
        raise CheckpointError(
            f"{where} does not hold {missing[0]}"
            + (f" and {len(missing) - 1} more tensors that are needed" if len(missing) > 1 else "")
        )
    source = manifest.layout(names)
    target = Layout(
        {rank: {n: tuple(b) for n, b in boxes.items()} for rank, boxes in wanted.items()}
    )
    try:
        moves = transfers(source, target, cost=lambda holder, rank: 1)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    taken: defaultdict[tuple[str, str, int], list[Delivery]] = defaultdict(list)
    for move in moves:
        taken[move.source].append(Delivery(move.target, move.box))  # pyrefly: ignore
    reads: defaultdict[int, list[PieceRead]] = defaultdict(list)
    load: dict[int, int] = dict.fromkeys(sorted(wanted), 0)
    for file, entry in manifest.files.items():
        for name in entry.pieces:
            if name not in names:
                continue
            for place, piece in enumerate(entry.pieces[name]):
                deliveries = taken.get((file, name, place))
                if not deliveries:
                    continue
                # The least loaded rank that needs a piece reads it: most bytes then stay there.
                reader = min({d.rank for d in deliveries}, key=lambda rank: (load[rank], rank))
                load[reader] += piece.length
                dtype = manifest.tensors[name].dtype
                reads[reader].append(PieceRead(name, dtype, file, piece, tuple(deliveries)))
    largest = max((r.piece.length for listed in reads.values() for r in listed), default=0)
    limit = max(load_bytes, largest)
    loads = {rank: _loads(reads[rank], limit) for rank in sorted(wanted)}
    return ReadPlan(loads, limit)


def _loads(reads: Sequence[PieceRead], limit: int) -> tuple[tuple[PieceRead, ...], ...]:
    ordered = sorted(reads, key=lambda read: (read.file, read.piece.offset))
    loads: list[list[PieceRead]] = []
    size = limit
    for read in ordered:
        if size + read.piece.length > limit:
            loads.append([])
            size = 0
        loads[-1].append(read)
        size += read.piece.length
    return tuple(map(tuple, loads))


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A range of one file that is read in one request."""

    file: str
    offset: int
    length: int
    place: int
    """The offset in the load's memory: as far from a multiple of ALIGNMENT as in the file."""
    target: int = 0
    """The address of the bytes if they do not go to the load's memory; else 0."""

    def address(self, memory: int) -> int:
        """The address of the bytes, given the address of the load's memory."""
        return self.target or memory + self.place


def requests_of(
    reads: Sequence[PieceRead], targets: Mapping[int, int] | None = None
) -> tuple[list[ReadRequest], list[int], int]:
    """The requests of a load: (requests, offset of each piece, bytes of memory).

    Pieces that follow each other in a file share one request.

    Args:
        targets: piece number -> address, for pieces that do not go to the load's memory. Their room
            stays empty, so that offsets are equal on ranks that do not know these addresses.
    """
    own = targets or {}
    requests: list[ReadRequest] = []
    places: list[int] = []
    end = 0
    before: PieceRead | None = None
    for number, read in enumerate(reads):
        piece = read.piece
        follows = (
            before is not None
            and before.file == read.file
            and before.piece.offset + before.piece.length == piece.offset
        )
        before = read
        place = end if follows else -(-end // ALIGNMENT) * ALIGNMENT + piece.offset % ALIGNMENT
        places.append(place)
        end = place + piece.length
        if number in own:
            requests.append(ReadRequest(read.file, piece.offset, piece.length, place, own[number]))
        elif follows and not requests[-1].target:
            last = requests[-1]
            requests[-1] = ReadRequest(
                last.file, last.offset, last.length + piece.length, last.place
            )
        else:
            requests.append(ReadRequest(read.file, piece.offset, piece.length, place))
    return requests, places, end
