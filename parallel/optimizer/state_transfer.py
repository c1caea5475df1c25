"""The transfer of live optimizer state between ranks, by block transfers. Exact-mode safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from holdfast.parallel.comm import STATE_TRANSFER, Communicator, Handle
from holdfast.parallel.optimizer.rules import StateFormat
from holdfast.parallel.optimizer.transfer_messages import BlockMessages, BlockState
from holdfast.parallel.plan import BlockKey, BlockTransfer

_WINDOW = 4
"""Messages under way at once, in each direction."""


def move_blocks(
    block_transfers: Sequence[BlockTransfer],
    rank: int,
    comm: Communicator,
    read: Callable[[BlockKey], BlockState],
    write: Callable[[BlockKey, BlockState], None],
    *,
    form: StateFormat,
) -> None:
    """Send and receive this rank's transfers. Collective over their sources and targets.

    Every rank processes its transfers in the order of the list, so that none waits in a circle.

    Args:
        comm: carries CPU tensors.
        read: returns a held block's state.
        write: stores a needed block's state, which lies in CPU memory that is not used again.
        form: the format of the blocks' state.
    Raises:
        PeerLost: a peer is gone, or its state arrived damaged.
    """
    messages = BlockMessages(comm, form, STATE_TRANSFER)
    under_way: list[tuple[BlockTransfer, list[Handle], list[Tensor]]] = []

    def finish() -> None:
        transfer, handles, incoming = under_way.pop(0)
        for handle in handles:
            handle.wait()
        if incoming:
            checksum, content = incoming
            for key, state in messages.unpacked(transfer, content, checksum):
                write(key, state)

    for number, transfer in enumerate(block_transfers):
        if rank not in (transfer.source, transfer.target):
            continue
        if len(under_way) >= _WINDOW:
            finish()
        if transfer.source == rank:
            under_way.append((transfer, messages.send(number, transfer, read), []))
            continue
        first, checksum = messages.receive_checksum(number, transfer)
        second, content = messages.receive_content(number, transfer)
        under_way.append((transfer, [first, second], [checksum, content]))
    while under_way:
        finish()
