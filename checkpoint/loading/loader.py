"""Loading: each rank gets its boxes. A node reads every byte once and checks it before its use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from holdfast import _native
from holdfast.checkpoint.format import DTYPE_NAMES, TORCH_DTYPES, Manifest
from holdfast.checkpoint.loading.node_memory import NodeMeeting, NodeMemory
from holdfast.checkpoint.loading.read_plan import (
    PieceRead,
    ReadPlan,
    ReadRequest,
    make_read_plan,
    requests_of,
)
from holdfast.checkpoint.loading.readers import ByteReader
from holdfast.checkpoint.loading.targets import Targets, move_overlaps, without_overlaps
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

LOAD_BYTES = 32 << 20
"""Bytes read and handed on at a time; a rank holds two such loads beside its own state."""


@dataclass(slots=True)
class LoadStatistics:
    """What loading read and took on this rank."""

    read_bytes: int = 0
    node_bytes: int = 0
    """Bytes read by all ranks of the node together."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The request of one rank: a checkpoint, its reader and the targets."""

    manifest: Manifest
    reader: ByteReader
    targets: Targets
    wanted: Mapping[int, Mapping[str, Sequence[Box]]]
    """The boxes that every rank of the node wants; this rank's are those of `targets`."""
    rank: int
    where: str = "checkpoint"
    """The checkpoint's path or URL, for messages."""
    verify: bool = True
    """Whether each piece is checked against its checksum."""


def load(request: LoadRequest, meeting: NodeMeeting | None = None) -> LoadStatistics:
    """Fill this rank's targets.

    Collective over the ranks of the node, the keys of `request.wanted`.

    Args:
        meeting: the meeting of the node's ranks; needed for more than one rank.
    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or has other shapes; raised on every
            rank of the node.
        PeerLost: a rank of the node died.
    """
    began = perf_counter()
    _check_shapes(request)
    targets, shared = without_overlaps(request.targets)
    request = replace(request, targets=targets)
    where = request.where
    plan = make_read_plan(request.manifest, request.wanted, load_bytes=LOAD_BYTES, where=where)
    statistics = LoadStatistics(node_bytes=plan.bytes)
    if len(request.wanted) == 1:
        _load_alone(request, plan, statistics)
    else:
        assert meeting is not None, "ranks that load together need to meet"
        memory = NodeMemory(meeting, request.rank, sorted(request.wanted), plan.memory_bytes)
        try:
            _load_together(request, plan, memory, statistics)
        except CheckpointError as error:
            memory.report_failure(str(error))
            raise
        finally:
            memory.close()
    move_overlaps(shared)
    statistics.seconds = perf_counter() - began
    return statistics


def boxes_of(targets: Targets) -> dict[str, tuple[Box, ...]]:
    """The boxes of a rank's targets, by tensor."""
    return {name: tuple(dict.fromkeys(t.box for t in found)) for name, found in targets.items()}


def _check_shapes(request: LoadRequest) -> None:
    manifest, targets, where = request.manifest, request.targets, request.where
    for name, found in targets.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            continue
        for target in found:
            dtype = DTYPE_NAMES.get(target.memory.dtype)
            if entry.dtype != dtype:
                raise CheckpointError(
                    f"{where}: {name} has dtype {entry.dtype}, and {dtype} is needed"
                )
            if len(target.box.start) != len(entry.shape) or not Box.whole(entry.shape).contains(
                target.box
            ):
                raise CheckpointError(
                    f"{where}: {name} has shape {list(entry.shape)}, and box {target.box} of it "
                    "is needed"
                )


def _load_alone(request: LoadRequest, plan: ReadPlan, statistics: LoadStatistics) -> None:
    slot = torch.empty(plan.memory_bytes + 4096, dtype=torch.uint8)
    slot = slot[-slot.data_ptr() % 4096 :]
    for pieces in plan.loads[request.rank]:
        _read(request, pieces, slot, statistics)
        _deliver(request, pieces, slot, own=True)


def _load_together(
    request: LoadRequest, plan: ReadPlan, memory: NodeMemory, statistics: LoadStatistics
) -> None:
    """Load in rounds: round k reads this rank's load k and takes boxes from every load k - 1."""
    rank, mine = memory.rank, plan.loads[memory.rank]
    for number in range(plan.rounds + 1):
        if number < len(mine):
            if number >= 2:
                memory.wait_free(number, plan.receivers(rank, number - 2))
            slot = memory.slot(rank, number)
            _read(request, mine[number], slot, statistics)
            memory.publish(number)
        if number == 0:
            continue
        for reading, pieces in _interesting(plan, rank, number - 1):
            memory.wait_filled(reading, number - 1)
            slot = memory.slot(reading, number - 1)
            _deliver(request, pieces, slot, own=reading == rank)
            memory.took(reading, number - 1)
    # Owners unmap their slots only after every rank has taken the last loads.
    for number in range(max(0, len(mine) - 2), len(mine)):
        memory.wait_free(number + 2, plan.receivers(rank, number))


def _interesting(
    plan: ReadPlan, rank: int, number: int
) -> Iterator[tuple[int, tuple[PieceRead, ...]]]:
    """The loads of a round that this rank takes boxes from, its own first."""
    for reading in sorted(plan.loads, key=lambda peer: (peer != rank, peer)):
        loads = plan.loads[reading]
        if number < len(loads) and rank in plan.receivers(reading, number):
            yield reading, loads[number]


def _own_memory(pieces: Sequence[PieceRead], targets: Targets, rank: int) -> dict[int, int]:
    """The pieces that only this rank wants, whole: piece number -> address in its state."""
    found: dict[int, int] = {}
    for number, read in enumerate(pieces):
        if len(read.deliveries) != 1 or read.deliveries[0].box != read.piece.box:
            continue
        places = [t for t in targets[read.name] if t.box.intersect(read.piece.box) is not None]
        if len(places) == 1 and places[0].box.contains(read.piece.box):
            part = places[0].memory[read.piece.box.relative_to(places[0].box).slices]
            if part.device.type == "cpu" and part.is_contiguous() and part.numel():
                found[number] = part.data_ptr()
    return found


def _read(
    request: LoadRequest, pieces: Sequence[PieceRead], slot: Tensor, statistics: LoadStatistics
) -> None:
    """Read a load into a slot, or directly into this rank's state, and check it."""
    own = _own_memory(pieces, request.targets, request.rank)
    requests, places, _ = requests_of(pieces, own)
    statistics.read_bytes += sum(asked.length for asked in requests)
    number = 0
    # A piece is checked as soon as it is there, still in a cache, while the next ones arrive.
    for arrived in request.reader.read(requests, slot.data_ptr()):
        asked = requests[arrived]
        end = asked.offset + asked.length
        while number < len(pieces) and _lies_in(pieces[number], asked, end):
            if request.verify:
                address = own.get(number, slot.data_ptr() + places[number])
                found = _native.crc32c(address, pieces[number].piece.length)
                _check(pieces[number], found, request.where)
            number += 1


def _lies_in(read: PieceRead, request: ReadRequest, end: int) -> bool:
    return (
        read.file == request.file
        and request.offset <= read.piece.offset
        and read.piece.offset + read.piece.length <= end
    )


def _check(read: PieceRead, found: int, where: str) -> None:
    if found != read.piece.crc32c:
        raise CheckpointError(
            f"{where}/{read.file} is damaged: {read.name}{read.piece.box} at byte "
            f"{read.piece.offset} has checksum {found:08x}, not {read.piece.crc32c:08x}"
        )


def _deliver(request: LoadRequest, pieces: Sequence[PieceRead], slot: Tensor, own: bool) -> None:
    """Copy this rank's boxes out of a slot.

    Args:
        own: whether this rank has read the load itself.
    """
    targets, rank = request.targets, request.rank
    elsewhere = _own_memory(pieces, targets, rank) if own else {}
    places = requests_of(pieces)[1]
    for number, (read, place) in enumerate(zip(pieces, places, strict=True)):
        mine = [delivery.box for delivery in read.deliveries if delivery.rank == rank]
        if not mine or number in elsewhere:
            continue
        values = piece_values(slot[place : place + read.piece.length], read)
        for box in mine:
            for target in targets[read.name]:
                common = target.box.intersect(box)
                if common is None:
                    continue
                part = values[common.relative_to(read.piece.box).slices]
                target.memory[common.relative_to(target.box).slices].copy_(part)


def piece_values(content: Tensor, read: PieceRead) -> Tensor:
    """The bytes of a piece (uint8) as values in the shape of its box."""
    dtype = TORCH_DTYPES[read.dtype]
    if content.data_ptr() % dtype.itemsize or content.storage_offset() % dtype.itemsize:
        content = content.clone()
    return content.view(dtype).view(read.piece.box.shape)
