"""Gradient sums packed for the wire: without the high bytes that only repeat the sign.

Sums of runs of 4096 elements are sent with as many bytes as the largest of a run needs, most often
4 or 5 of 8. No bit is lost. The format is in csrc/packing.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast import _native

SMALLEST_PACKED = 1024
"""The fewest elements that are worth packing. From here on packed sums take at most 1.01 of their
own bytes, whatever they are; the header of fewer could cost more than it saves."""


def packed_bytes_bound(count: int) -> int:
    """The most bytes that `count` packed sums take. Pure."""
    return _native.packed_bound(count)


def pack(sums: Tensor, out: Tensor) -> int:
    """Write the packed form of `sums` to `out`. Local.

    Args:
        sums: int64, contiguous, of any shape.
        out: uint8[packed_bytes_bound(sums.numel()) or more].
    Returns:
        The bytes written.
    Raises:
        ValueError: a tensor has another dtype or device, holes, or too few elements.
    """
    _check("sums", sums, torch.int64)
    _check("out", out, torch.uint8)
    bound = packed_bytes_bound(sums.numel())
    if out.numel() < bound:
        raise ValueError(
            f"out has {out.numel()} bytes; {sums.numel()} packed sums can take {bound}"
        )
    return _native.pack_i64(sums.data_ptr(), sums.numel(), out.data_ptr())


def unpack_add(packed: Tensor, base: Tensor | None, out: Tensor) -> int:
    """Write `base` plus the packed sums to `out`. Local.

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
    _check("packed", packed, torch.uint8)
    _check("out", out, torch.int64)
    if base is not None:
        _check("base", base, torch.int64)
        if base.numel() != out.numel():
            raise ValueError(f"base has {base.numel()} elements, out {out.numel()}; equal numbers")
    return _native.unpack_add_i64(
        packed.data_ptr(),
        packed.numel(),
        0 if base is None else base.data_ptr(),
        out.data_ptr(),
        out.numel(),
    )


def _check(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; sums are packed and unpacked on the CPU")
    if tensor.dtype != dtype or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(f"{name} is {tensor.dtype} and {layout}; it must be contiguous {dtype}")
