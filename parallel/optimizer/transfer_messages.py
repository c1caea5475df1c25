"""Block transfers as messages: a CRC-32C, then the state of the blocks in one tensor of bytes.

A transfer has a number that is equal on both ends. Damaged state is rejected. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast import _native
from holdfast.parallel.comm import Communicator, Handle, TagRange
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.optimizer.rules import StateFormat
from holdfast.parallel.plan import BlockKey, BlockTransfer

BlockState = Mapping[str, Tensor]
"""A block's tensors by kind (`StateFormat.held`), flat."""
_PAUSE = -1
"""A message in place of a checksum: nothing more is sent for now."""


def carried_bytes(block_transfers: Sequence[BlockTransfer], form: StateFormat) -> int:
    """The bytes that some transfers carry together. Pure."""
    elements = sum(sum(transfer.sizes) for transfer in block_transfers)
    return form.held_bytes * elements


@dataclass(frozen=True, slots=True)
class BlockMessages:
    """Sends and receives transfers over one communicator, which carries CPU tensors."""

    comm: Communicator
    form: StateFormat
    tags: TagRange
    """The tags: transfer n uses messages 2n (checksum) and 2n + 1 (content)."""

    def send(
        self, number: int, transfer: BlockTransfer, read: Callable[[BlockKey], BlockState]
    ) -> list[Handle]:
        """Begin to send a transfer; `read` returns a held block's state."""
        states = [read(key) for key in transfer.keys]
        content = torch.cat(
            [
                state[kind].reshape(-1).cpu().view(torch.uint8)
                for state in states
                for kind in self.form.held
            ]
        )
        checksum = torch.tensor([_checksum(content)], dtype=torch.int64)
        return [
            self.comm.send(checksum, transfer.target, self.tags.tag(2 * number)),
            self.comm.send(content, transfer.target, self.tags.tag(2 * number + 1)),
        ]

    def send_pause(self, number: int, target: int) -> Handle:
        """Tell a rank that expects transfer `number` that it will come later."""
        pause = torch.tensor([_PAUSE], dtype=torch.int64)
        return self.comm.send(pause, target, self.tags.tag(2 * number))

    def receive_checksum(self, number: int, transfer: BlockTransfer) -> tuple[Handle, Tensor]:
        """Begin to receive a checksum: int64[1]; see `is_pause`."""
        checksum = torch.empty(1, dtype=torch.int64)
        tag = self.tags.tag(2 * number)
        return self.comm.receive(checksum, transfer.source, tag), checksum

    def receive_content(self, number: int, transfer: BlockTransfer) -> tuple[Handle, Tensor]:
        """Begin to receive the state of a transfer's blocks: uint8[bytes of all kinds]."""
        content = torch.empty(carried_bytes([transfer], self.form), dtype=torch.uint8)
        tag = self.tags.tag(2 * number + 1)
        return self.comm.receive(content, transfer.source, tag), content

    def unpacked(
        self, transfer: BlockTransfer, content: Tensor, checksum: Tensor
    ) -> Iterator[tuple[BlockKey, BlockState]]:
        """The blocks of a transfer that has arrived.

        Raises:
            PeerLost: the transfer arrived damaged.
        """
        if _checksum(content) != int(checksum):
            raise PeerLost(
                f"optimizer state from rank {transfer.source} arrived damaged: its checksum does "
                "not match"
            )
        start = 0
        for key, size in zip(transfer.keys, transfer.sizes, strict=True):
            state: dict[str, Tensor] = {}
            for kind in self.form.held:
                precision = self.form.precision_of(kind)
                part = content[start : start + size * precision.bytes]
                if start % precision.bytes:
                    part = part.clone()  # its values would not be aligned
                state[kind] = part.view(precision.dtype)
                start += size * precision.bytes
            yield key, state


def is_pause(checksum: Tensor) -> bool:
    """Whether a received checksum, int64[1], is a pause."""
    return int(checksum) == _PAUSE


def _checksum(content: Tensor) -> int:
    return _native.crc32c(content.data_ptr(), content.numel() * content.element_size())
