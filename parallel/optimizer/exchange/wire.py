"""The forms of gradient sums on the wire: as they are, packed without loss, or rounded.

Local. Packing does not change a bit, so it is exact-mode safe; rounding belongs to fast mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.parallel.optimizer.kernels import operations_of
from holdfast.parallel.optimizer.packing import (
    SMALLEST_PACKED,
    pack,
    packed_bytes_bound,
    unpack_add,
)


class Wire(Protocol):
    """A form of sums as messages."""

    def encode(self, sums: Tensor) -> Tensor:
        """The message of some flat sums: themselves, or a new tensor."""
        ...

    def buffer(self, elements: int) -> Tensor:
        """Room for the longest message of this many sums; a message may be shorter."""
        ...

    def add(self, message: Tensor, own: Tensor, total: Tensor) -> int:
        """Set `total`, which may be `own`, to own + the message's sums.

        Returns:
            Flags (integer overflow).
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainWire:
    """Sums as they are, or floats rounded to a narrower dtype; they are added in their own."""

    dtype: torch.dtype
    device: torch.device

    def encode(self, sums: Tensor) -> Tensor:
        return sums.to(self.dtype)

    def buffer(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self.dtype, device=self.device)

    def add(self, message: Tensor, own: Tensor, total: Tensor) -> int:
        if total.dtype != torch.int64:
            torch.add(own, message, out=total)
            return 0
        return _add_integers(message, own, total)


@dataclass(frozen=True, slots=True)
class PackedWire:
    """Integer sums in as few bytes as the largest of each run needs; see packing.py."""

    device: torch.device

    def encode(self, sums: Tensor) -> Tensor:
        if sums.numel() < SMALLEST_PACKED:
            return sums
        message = self.buffer(sums.numel())
        return message[: pack(sums, message)]

    def buffer(self, elements: int) -> Tensor:
        if elements < SMALLEST_PACKED:
            return torch.empty(elements, dtype=torch.int64, device=self.device)
        size = packed_bytes_bound(elements)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def add(self, message: Tensor, own: Tensor, total: Tensor) -> int:
        if message.dtype != torch.int64:
            return unpack_add(message, own, total)
        return _add_integers(message, own, total)


def _add_integers(message: Tensor, own: Tensor, total: Tensor) -> int:
    if total is not own:
        total.copy_(own)
    return operations_of(total.device).add_integers(total, message)


def in_one(parts: Sequence[Tensor]) -> Tensor:
    """Flat tensors one after another: the only one itself, or a copy of several."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
