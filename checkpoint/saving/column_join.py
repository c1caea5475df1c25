"""The joining of weights that tensor parallelism splits along columns into whole rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from holdfast.checkpoint.format import PlannedPiece
from holdfast.checkpoint.saving.arena import Cancelled
from holdfast.checkpoint.saving.snapshot import Snapshot
from holdfast.parallel.comm import Communicator, Handle
from holdfast.parallel.layout import Box


def join_pieces(
    pieces: Sequence[PlannedPiece],
    rank: int,
    source: Callable[[str, Box], Tensor],
    comm: Communicator,
    snapshot: Snapshot,
) -> dict[tuple[str, int], int]:
    """Send this rank's parts to their writers, and write the pieces that this rank joins.

    Collective over `comm`. A member that cannot write goes on sending, so that no other waits.

    Args:
        pieces: the pieces that this rank writes or sends, in the order of the plan.
        source: (tensor, box) -> this rank's live values of that box.
        comm: the tensor-parallel group, over CPU tensors.
        snapshot: writes the joined pieces; its files are open.
    Returns:
        CRC-32C of each joined piece written here, by (file, offset).
    Raises:
        OSError, Cancelled: a piece could not be written; after everything was sent.
    """
    joined = [piece for piece in pieces if piece.sources]
    checksums: dict[tuple[str, int], int] = {}
    failure: Exception | None = None
    for first in range(0, len(joined), comm.size):
        exchanges = [
            _exchange(piece, rank, source, comm, tag)
            for tag, piece in enumerate(joined[first : first + comm.size])
        ]
        for piece, (handles, whole, parts) in zip(joined[first:], exchanges, strict=False):
            for handle in handles:
                handle.wait()
            if whole is None or failure is not None:
                continue
            for box, part in parts:
                whole[box.relative_to(piece.box).slices].copy_(part)
            try:
                crc = snapshot.write_now(whole, piece.file, piece.offset)
                checksums[piece.file, piece.offset] = crc
            except (OSError, Cancelled) as error:
                failure = error
    if failure is not None:
        raise failure
    return checksums


_Exchange = tuple[list[Handle], Tensor | None, list[tuple[Box, Tensor]]]


def _exchange(
    piece: PlannedPiece,
    rank: int,
    source: Callable[[str, Box], Tensor],
    comm: Communicator,
    tag: int,
) -> _Exchange:
    """Post one piece's messages: (handles, the piece's memory on its writer, its parts there)."""
    mine = next(part.box for part in piece.sources if part.holders == (rank,))
    own = source(piece.name, mine).cpu()
    if piece.writer != rank:
        return [comm.send(_raw(own), piece.writer, tag)], None, []
    handles: list[Handle] = []
    parts = [(mine, own)]
    for part in piece.sources:
        if part.holders != (rank,):
            incoming = torch.empty(part.box.shape, dtype=own.dtype)
            parts.append((part.box, incoming))
            handles.append(comm.receive(_raw(incoming), part.holders[0], tag))
    return handles, torch.empty(piece.box.shape, dtype=own.dtype), parts


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
