"""Gradient sums packed for the wire: without the high bytes that only repeat the sign.

Sums of runs of 512 elements are sent with as many bytes as the largest of a run needs, most often
4 or 5 of 8. No bit is lost. The format is in csrc/packing.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast import _native
from holdfast.parallel.optimizer.kernels import operations_of

SMALLEST_PACKED = 1024
"""The fewest elements that are worth packing. From here on packed sums take at most 1.01 of their
own bytes, whatever they are; the header of fewer could cost more than it saves."""


def packed_bytes_bound(count: int) -> int:
    """The most bytes that `count` packed sums take. Pure."""
    return _native.packed_bound(count)


def pack(sums: Tensor, out: Tensor) -> int:
    """Write the packed form of `sums` to `out`. Local; waits for a CUDA device.

    Args:
        sums: int64, contiguous, of any shape.
        out: uint8[packed_bytes_bound(sums.numel()) or more].
    Returns:
        The bytes written.
    Raises:
        ValueError: a tensor has another dtype or device, holes, or too few elements.
    """
    _check("sums", sums, torch.int64, sums.device)
    _check("out", out, torch.uint8, sums.device)
    bound = packed_bytes_bound(sums.numel())
    if out.numel() < bound:
        raise ValueError(
            f"out has {out.numel()} bytes; {sums.numel()} packed sums can take {bound}"
        )
    return operations_of(sums.device).pack(sums.view(-1), out)


def unpack_add(packed: Tensor, base: Tensor | None, out: Tensor) -> int:
    """Write `base` plus the packed sums to `out`. Local; waits for a CUDA device.

    Args:
        packed: uint8, as `pack` wrote it for out.numel() sums; what follows them is not read.
        base: int64, contiguous, as many as out; may be `out`; None stands for zeros.
        out: int64, contiguous, of any shape.
    Returns:
        Flags: OUT_OF_RANGE if a sum overflowed (it wraps, as in `add_integers`).
    Raises:
        ValueError: a tensor is unfit as in `pack`, or `packed` is not what `pack` writes for so
            many sums; `out` is as it was.
    """
    _check("packed", packed, torch.uint8, out.device)
    _check("out", out, torch.int64, out.device)
    if base is not None:
        _check("base", base, torch.int64, out.device)
        if base.numel() != out.numel():
            raise ValueError(f"base has {base.numel()} elements, out {out.numel()}; equal numbers")
    flat = None if base is None else base.view(-1)
    return operations_of(out.device).unpack_add(packed, flat, out.view(-1))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {tensor.device}; sums are packed on CPU and CUDA devices")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and the sums on {device}; use one device")
    if tensor.dtype != dtype or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(f"{name} is {tensor.dtype} and {layout}; it must be contiguous {dtype}")
