"""`SumOperations` by torch's own operations: for devices without kernels, and to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.parallel.optimizer.kernels import native_operations
from holdfast.parallel.optimizer.kernels.operations import NONFINITE, OUT_OF_RANGE

_ODD = 0x9E3779B97F4A7C15
_AT_ONCE = 1 << 22
"""The elements whose weights are in memory at once."""


def fixed_point(gradient: Tensor, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """The int64 fixed-point form of `gradient`.

    Args:
        gradient: float of any dtype and shape.
    Returns:
        int64 of the same shape (zero where it cannot be represented), and flags: int64 scalar,
        NONFINITE | OUT_OF_RANGE. Bit-equal to the native kernel.
    """
    scaled = torch.round(gradient.double() * 2.0**fraction_bits)
    finite = torch.isfinite(scaled)
    fits = scaled.abs() < 2.0**63
    usable = finite & fits
    flags = (~torch.isfinite(gradient)).any().long() * NONFINITE
    flags = flags + (torch.isfinite(gradient) & ~fits).any().long() * OUT_OF_RANGE
    return torch.where(usable, scaled, 0.0).to(torch.int64), flags


def _overflows(before: Tensor, added: Tensor, total: Tensor) -> Tensor:
    return ((before ^ total) & (added ^ total)) < 0


def accumulate(
    sums: Tensor, gradient: Tensor, fraction_bits: int, flags: Tensor, *, first: bool = False
) -> None:
    """See `SumOperations.accumulate`."""
    integers, found = fixed_point(gradient.view(sums.shape), fraction_bits)
    if first:
        sums.copy_(integers)
        flags |= found
        return
    before = sums.clone()
    sums.add_(integers)
    flags |= found | _overflows(before, integers, sums).any().long() * OUT_OF_RANGE


def accumulate_rows(
    sums: Tensor, rows: Tensor, gradient: Tensor, fraction_bits: int, flags: Tensor
) -> None:
    """See `SumOperations.accumulate_rows`."""
    integers, found = fixed_point(gradient, fraction_bits)
    before = sums.index_select(0, rows)
    total = before + integers
    sums.index_copy_(0, rows, total)
    flags |= found | _overflows(before, integers, total).any().long() * OUT_OF_RANGE


def add_integers(sums: Tensor, other: Tensor) -> int:
    """See `SumOperations.add_integers`."""
    before = sums.clone()
    sums.add_(other)
    return OUT_OF_RANGE if bool(_overflows(before, other, sums).any()) else 0


def convert(sums: Tensor, output: Tensor, fraction_bits: int) -> float:
    """See `SumOperations.convert`."""
    # Through float64, float32 would be rounded twice.
    torch.mul(sums.to(output.dtype), 2.0**-fraction_bits, out=output)
    return sum_squares(output)


def sum_squares(values: Tensor) -> float:
    """See `SumOperations.sum_squares`."""
    return float(values.double().square().sum())


def bit_sums(parts: Sequence[tuple[Tensor, int]]) -> list[int]:
    """See `SumOperations.bit_sums`."""
    if not parts:
        return []
    totals = torch.stack([_bit_sum(values, first) for values, first in parts])
    return [total % 2**64 for total in totals.tolist()]


def _bit_sum(values: Tensor, first: int) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    flat, mask = values.reshape(-1).view(integers), (1 << 8 * values.element_size()) - 1
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, flat.numel(), _AT_ONCE):
        words = flat[start : start + _AT_ONCE].long()
        if values.element_size() < 8:
            words &= mask
        places = torch.arange(len(words), device=words.device)
        begin = _signed((first + start) * _ODD)
        total += (words * ((places * _signed(_ODD) + begin) | 1)).sum()
    return total


def _signed(value: int) -> int:
    """A number modulo 2**64, as int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


def pack(sums: Tensor, output: Tensor) -> int:
    """See `SumOperations.pack`; the native kernel does it in host memory."""
    packed = torch.empty(output.shape, dtype=torch.uint8)
    written = native_operations.pack(sums.cpu(), packed)
    output[:written] = packed[:written].to(output.device)
    return written


def unpack_add(packed: Tensor, base: Tensor | None, output: Tensor) -> int:
    """See `SumOperations.unpack_add`; the native kernel does it in host memory."""
    total = torch.empty(output.shape, dtype=torch.int64)
    added_to = None if base is None else base.cpu()
    flags = native_operations.unpack_add(packed.cpu(), added_to, total)
    output.copy_(total)
    return flags
