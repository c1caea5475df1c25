"""Host memory for the state of one moment: copied before `save` returns, written afterwards.

A program may change its tensors at any time and in ways that nothing tells (`tensor.data`, numpy
views, kernels of its own). So the copy is made at once, and nothing that follows can reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from holdfast.checkpoint.format import PlannedPiece
from holdfast.parallel.layout import Box

_ALIGNMENT = 64


class Staging:
    """Memory for the pieces that one rank writes; it is kept from save to save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(
        self, pieces: Iterable[PlannedPiece], source: Callable[[str, Box], Tensor]
    ) -> Callable[[str, Box], Tensor]:
        """Copy the pieces, and return the source of the copies. The last copies are overwritten.

        Args:
            source: the live values of a box, with any strides, on any device.
        """
        live = {(piece.name, piece.box): source(piece.name, piece.box) for piece in pieces}
        places: dict[tuple[str, Box], int] = {}
        size = 0
        for place, values in live.items():
            places[place] = size
            size += -(-values.numel() * values.element_size() // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(values.is_cuda for values in live.values())
        if self._memory.numel() < size:
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        copies: dict[tuple[str, Box], Tensor] = {}
        for place, values in live.items():
            begin, nbytes = places[place], values.numel() * values.element_size()
            copy = self._memory[begin : begin + nbytes].view(values.dtype).view(values.shape)
            copies[place] = copy.copy_(values, non_blocking=on_gpu)
        for device in {values.device for values in live.values() if values.is_cuda}:
            torch.cuda.synchronize(device)
        return lambda name, box: copies[name, box]
