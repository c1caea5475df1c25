"""How Triton's kernels are started."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def programs(elements: int, block: int) -> int:
    """The number of programs for `elements`, of which each does `block`. Pure."""
    return -(-elements // block)


def launch(
    kernel: Any, grid: tuple[int, ...], first: Tensor, *others: object, **settings: object
) -> None:
    """Start `kernel` on the device of its first argument, on its current stream. Local.

    Args:
        grid: the number of programs in each direction.
        settings: the kernel's constants, and the compiler's options.
    """
    with torch.cuda.device_of(first):
        kernel[grid](first, *others, **settings)
