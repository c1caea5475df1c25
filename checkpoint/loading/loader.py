"""Loading: every rank gets its boxes, each byte read once per node and checked before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor
from torch.distributed import Store

from holdfast import _native
from holdfast.checkpoint.format import DTYPE_NAMES, TORCH_DTYPES, Manifest
from holdfast.checkpoint.loading.node_memory import NodeMemory
from holdfast.checkpoint.loading.read_plan import (
    PieceRead,
    ReadPlan,
    Request,
    make_read_plan,
    requests_of,
)
from holdfast.checkpoint.loading.readers import ByteReader
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

LOAD_BYTES = 32 << 20
"""What a rank reads and hands on at a time; it holds two of these beside its own state."""


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """Where a box of a tensor goes."""

    box: Box
    memory: Tensor
    """In the box's shape, any strides, any device."""


Targets = Mapping[str, Sequence[LoadTarget]]
"""By tensor; a box that is wanted twice is read once."""


@dataclass(slots=True)
class LoadStatistics:
    """What loading took on this rank."""

    read_bytes: int = 0
    node_bytes: int = 0
    """Read by all ranks of the node together."""
    seconds: float = 0.0
    shared_bytes: int = field(default=0)
    """Host memory of this rank beside its own state."""


def load(
    manifest: Manifest,
    reader: ByteReader,
    targets: Targets,
    wanted: Mapping[int, Mapping[str, Sequence[Box]]],
    rank: int,
    *,
    store: Store | None = None,
    name: str = "",
    verify: bool = True,
    timeout_s: float = 600.0,
    check: Callable[[], None] = lambda: None,
    where: str = "checkpoint",
) -> LoadStatistics:
    """Fill this rank's targets. Collective over the ranks of the node, which `wanted` lists.

    Args:
        targets: of this rank.
        wanted: the boxes of every rank of the node; this rank's are those of `targets`.
        store: of the node's ranks; needed for more than one.
        name: of this load, never used before on the store.
        verify: check each piece against its checksum.
        check: called while other ranks are waited for; what it raises ends the load.
    Raises:
        CheckpointError: damaged, incomplete or of other shapes; the same on every rank of the node.
        PeerLost: a rank of the node died.
    """
    began = perf_counter()
    _check_shapes(manifest, targets, where)
    plan = make_read_plan(manifest, wanted, load_bytes=LOAD_BYTES, where=where)
    statistics = LoadStatistics(node_bytes=plan.bytes)
    if len(wanted) == 1:
        _load_alone(plan, reader, targets, rank, verify, where, statistics)
    else:
        assert store is not None, "ranks that load together need a store"
        memory = NodeMemory(store, name, rank, sorted(wanted), plan.memory_bytes, timeout_s, check)
        statistics.shared_bytes = 2 * memory.slot_bytes
        try:
            _load_together(plan, reader, targets, memory, verify, where, statistics)
        except CheckpointError as error:
            memory.report_failure(str(error))
            raise
        finally:
            memory.close()
    statistics.seconds = perf_counter() - began
    return statistics


def boxes_of(targets: Targets) -> dict[str, tuple[Box, ...]]:
    """What a rank asks for: see `load`."""
    return {name: tuple(dict.fromkeys(t.box for t in found)) for name, found in targets.items()}


def _check_shapes(manifest: Manifest, targets: Targets, where: str) -> None:
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
                    f"{where}: {name} has shape {list(entry.shape)}, and box {target.box} of it is needed"
                )


def _load_alone(
    plan: ReadPlan,
    reader: ByteReader,
    targets: Targets,
    rank: int,
    verify: bool,
    where: str,
    statistics: LoadStatistics,
) -> None:
    slot = torch.empty(plan.memory_bytes + 4096, dtype=torch.uint8)
    slot = slot[-slot.data_ptr() % 4096 :]
    statistics.shared_bytes = slot.numel()
    for load_of_pieces in plan.loads[rank]:
        _read(load_of_pieces, reader, slot, targets, rank, verify, where, statistics)
        _deliver(load_of_pieces, slot, targets, rank, own=True)


def _load_together(
    plan: ReadPlan,
    reader: ByteReader,
    targets: Targets,
    memory: NodeMemory,
    verify: bool,
    where: str,
    statistics: LoadStatistics,
) -> None:
    """Round k: read my load k, then take what is mine from everybody's load k - 1."""
    rank, mine = memory.rank, plan.loads[memory.rank]
    for number in range(plan.rounds + 1):
        if number < len(mine):
            if number >= 2:
                memory.wait_free(number, plan.receivers(rank, number - 2))
            slot = memory.slot(rank, number)
            _read(mine[number], reader, slot, targets, rank, verify, where, statistics)
            memory.publish(number)
        if number == 0:
            continue
        for reading, pieces in _interesting(plan, rank, number - 1):
            memory.wait_filled(reading, number - 1)
            slot = memory.slot(reading, number - 1)
            _deliver(pieces, slot, targets, rank, own=reading == rank)
            memory.took(reading, number - 1)
    # The slots are unmapped by their owners only after everybody has taken the last loads.
    for number in range(max(0, len(mine) - 2), len(mine)):
        memory.wait_free(number + 2, plan.receivers(rank, number))


def _interesting(
    plan: ReadPlan, rank: int, number: int
) -> Iterator[tuple[int, tuple[PieceRead, ...]]]:
    """The loads of a round that this rank takes something from: its own first."""
    for reading in sorted(plan.loads, key=lambda peer: (peer != rank, peer)):
        loads = plan.loads[reading]
        if number < len(loads) and rank in plan.receivers(reading, number):
            yield reading, loads[number]


def _own_memory(pieces: Sequence[PieceRead], targets: Targets, rank: int) -> dict[int, int]:
    """By number: pieces that only this rank wants, whole, and the address where they go in its state."""
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
    pieces: Sequence[PieceRead],
    reader: ByteReader,
    slot: Tensor,
    targets: Targets,
    rank: int,
    verify: bool,
    where: str,
    statistics: LoadStatistics,
) -> None:
    """Bring a load into a slot, or where only this rank wants it, and check it."""
    own = _own_memory(pieces, targets, rank)
    requests, places, _ = requests_of(pieces, own)
    statistics.read_bytes += sum(request.length for request in requests)
    number = 0
    # A piece is checked as soon as it is there, while it is in a cache and the next ones arrive.
    for arrived in reader.read(requests, slot.data_ptr()):
        request = requests[arrived]
        end = request.offset + request.length
        while number < len(pieces) and _lies_in(pieces[number], request, end):
            if verify:
                address = own.get(number, slot.data_ptr() + places[number])
                _check(pieces[number], _native.crc32c(address, pieces[number].piece.length), where)
            number += 1


def _lies_in(read: PieceRead, request: Request, end: int) -> bool:
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


def _deliver(
    pieces: Sequence[PieceRead], slot: Tensor, targets: Targets, rank: int, own: bool
) -> None:
    """Take this rank's boxes out of a slot.

    Args:
        own: whether this rank has read the load itself.
    """
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
    """A piece's bytes (uint8) as values in the shape of its box."""
    dtype = TORCH_DTYPES[read.dtype]
    if content.data_ptr() % dtype.itemsize or content.storage_offset() % dtype.itemsize:
        content = content.clone()
    return content.view(dtype).view(read.piece.box.shape)
