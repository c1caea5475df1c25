"""The joining of weights that are split along columns into whole rows.

Tensor parallelism splits them between ranks; one rank may have several parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from holdfast.checkpoint.format import PlannedPiece
from holdfast.checkpoint.saving.arena import Cancelled
from holdfast.checkpoint.saving.snapshot import Snapshot
from holdfast.parallel.comm import Communicator, Handle
from holdfast.parallel.layout import Box

_AT_ONCE = 8
"""The pieces whose messages are under way at a time."""


def join_pieces(
    pieces: Sequence[PlannedPiece],
    rank: int,
    source: Callable[[str, Box], Tensor],
    comm: Communicator | None,
    snapshot: Snapshot,
) -> dict[tuple[str, int], int]:
    """Send this rank's parts to their writers, and write the pieces that this rank joins.

    Collective over `comm`, if there is one. Members have the pieces that they share in one order:
    the first piece that is not joined is under way at all of its ranks, so no two wait for each
    other. A member that cannot write goes on sending.

    Args:
        pieces: the pieces that this rank writes or sends, in the order of the plan.
        source: (tensor, box) -> this rank's live values of that box.
        comm: all ranks, over CPU tensors; None: each has all columns of what it writes.
        snapshot: writes the joined pieces; its files are open.
    Returns:
        CRC-32C of each joined piece written here, by (file, offset).
    Raises:
        OSError, Cancelled: a piece could not be written; after everything was sent.
    """
    joined = [piece for piece in pieces if piece.sources]
    checksums: dict[tuple[str, int], int] = {}
    failure: Exception | None = None
    messages: Counter[tuple[int, int]] = Counter()
    for first in range(0, len(joined), _AT_ONCE):
        exchanges = [
            _exchange(piece, rank, source, comm, messages)
            for piece in joined[first : first + _AT_ONCE]
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
    comm: Communicator | None,
    messages: Counter[tuple[int, int]],
) -> _Exchange:
    """Post one piece's messages: (handles, the piece's memory on its writer, its parts there).

    Args:
        messages: their number so far by (sender, receiver), equal at both: the next one's tag.
    """
    boxes = [part.box for part in piece.sources if part.holders == (rank,)]
    parts = [(box, source(piece.name, box).cpu()) for box in boxes]
    if piece.writer != rank:
        assert comm is not None
        way = rank, piece.writer
        return (
            [comm.send(_raw(part), piece.writer, _next(messages, way)) for _, part in parts],
            None,
            [],
        )
    dtype = parts[0][1].dtype
    handles: list[Handle] = []
    for part in piece.sources:
        [holder] = part.holders
        if holder != rank:
            assert comm is not None
            incoming = torch.empty(part.box.shape, dtype=dtype)
            parts.append((part.box, incoming))
            handles.append(comm.receive(_raw(incoming), holder, _next(messages, (holder, rank))))
    return handles, torch.empty(piece.box.shape, dtype=dtype), parts


def _next(messages: Counter[tuple[int, int]], way: tuple[int, int]) -> int:
    messages[way] += 1
    return messages[way]


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
