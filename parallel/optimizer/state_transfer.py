"""Live optimizer state from rank to rank, by block transfers.

Each message carries its CRC-32C, so that nothing is taken in that is
not what its source holds. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from holdfast import _native
from holdfast.parallel.comm import STATE_TRANSFER, Communicator, Handle
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.optimizer.shadow_state import STATE_KINDS
from holdfast.parallel.plan import BlockKey, BlockTransfer

_WINDOW = 4
"""Messages under way at once, each way."""

BlockState = Mapping[str, Tensor]
"""A block's tensors by kind, flat."""


def move_blocks(
    block_transfers: Sequence[BlockTransfer],
    rank: int,
    comm: Communicator,
    read: Callable[[BlockKey], BlockState],
    write: Callable[[BlockKey, BlockState], None],
    *,
    dtype: torch.dtype,
) -> None:
    """Send and receive this rank's transfers. Collective over their sources and targets.

    Every rank goes through its transfers in the order of the list, so that none waits in a circle.

    Args:
        comm: carries CPU tensors.
        read: a held block's state.
        write: takes in a needed block's state, in CPU memory that is not used again.
    Raises:
        PeerLost: a peer is gone, or what it sent arrived damaged.
    """
    mine = [(n, p) for n, p in enumerate(block_transfers) if rank in (p.source, p.target)]
    under_way: list[tuple[BlockTransfer, Tensor, Tensor, list[Handle]]] = []

    def finish() -> None:
        transfer, content, checksum, handles = under_way.pop(0)
        for handle in handles:
            handle.wait()
        if transfer.target != rank:
            return
        for key, state in unpack(transfer, content, int(checksum)):
            write(key, state)

    for number, transfer in mine:
        tag = STATE_TRANSFER.tag(2 * number)
        if len(under_way) >= _WINDOW:
            finish()
        if transfer.source == rank:
            content, checksum = pack([read(key) for key in transfer.keys])
            handles = [
                comm.send(checksum, transfer.target, tag),
                comm.send(content, transfer.target, tag + 1),
            ]
        else:
            content = torch.empty(len(STATE_KINDS) * sum(transfer.sizes), dtype=dtype)
            checksum = torch.empty(1, dtype=torch.int64)
            handles = [
                comm.receive(checksum, transfer.source, tag),
                comm.receive(content, transfer.source, tag + 1),
            ]
        under_way.append((transfer, content, checksum, handles))
    while under_way:
        finish()


def carried_bytes(block_transfers: Sequence[BlockTransfer], dtype: torch.dtype) -> int:
    """What all of some transfers carry. Pure."""
    return (
        len(STATE_KINDS) * dtype.itemsize * sum(sum(transfer.sizes) for transfer in block_transfers)
    )


def pack(states: Sequence[BlockState]) -> tuple[Tensor, Tensor]:
    """What a transfer carries: the blocks' state, flat, on the CPU; and its checksum, int64[1]."""
    content = torch.cat([state[kind].reshape(-1).cpu() for state in states for kind in STATE_KINDS])
    return content, torch.tensor([_checksum(content)], dtype=torch.int64)


def unpack(
    transfer: BlockTransfer, content: Tensor, checksum: int
) -> Iterator[tuple[BlockKey, BlockState]]:
    """The blocks of a transfer that has arrived.

    Raises:
        PeerLost: it arrived damaged.
    """
    if _checksum(content) != checksum:
        raise PeerLost(
            f"optimizer state from rank {transfer.source} arrived damaged: its checksum does not match"
        )
    kinds, start = len(STATE_KINDS), 0
    for key, size in zip(transfer.keys, transfer.sizes, strict=True):
        parts = content[start : start + kinds * size].view(kinds, size)
        yield key, dict(zip(STATE_KINDS, parts, strict=True))
        start += kinds * size


def _checksum(content: Tensor) -> int:
    return _native.crc32c(content.data_ptr(), content.numel() * content.element_size())
