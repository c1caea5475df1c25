"""`SumOperations` on CPU: the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast import _native

_ACCUMULATE = {
    torch.float32: _native.accumulate_f32,
    torch.bfloat16: _native.accumulate_bf16,
    torch.float64: _native.accumulate_f64,
}
_ACCUMULATE_ROWS = {
    torch.float32: _native.accumulate_rows_f32,
    torch.bfloat16: _native.accumulate_rows_bf16,
    torch.float64: _native.accumulate_rows_f64,
}

_BIT_SUMS = {2: _native.bit_sum_16, 4: _native.bit_sum_32, 8: _native.bit_sum_64}


def _widened(gradient: Tensor) -> Tensor:
    """A gradient of a dtype that has a kernel; float32 holds the values of all narrower types."""
    return gradient if gradient.dtype in _ACCUMULATE else gradient.float()


def accumulate(
    sums: Tensor, gradient: Tensor, fraction_bits: int, flags: Tensor, *, first: bool = False
) -> None:
    """See `SumOperations.accumulate`."""
    gradient = _widened(gradient)
    kernel = _ACCUMULATE[gradient.dtype]
    places = sums.data_ptr(), gradient.data_ptr(), gradient.numel()
    _note(kernel(*places, fraction_bits, first), flags)


def accumulate_rows(
    sums: Tensor, rows: Tensor, gradient: Tensor, fraction_bits: int, flags: Tensor
) -> None:
    """See `SumOperations.accumulate_rows`."""
    gradient = _widened(gradient)
    count = rows.numel()
    found = _ACCUMULATE_ROWS[gradient.dtype](
        sums.data_ptr(),
        gradient.data_ptr(),
        rows.data_ptr(),
        count,
        gradient.numel() // count if count else 0,
        fraction_bits,
    )
    _note(found, flags)


def _note(found: int, flags: Tensor) -> None:
    if found:
        flags |= found


def add_integers(sums: Tensor, other: Tensor) -> int:
    """See `SumOperations.add_integers`."""
    return _native.add_i64(sums.data_ptr(), other.data_ptr(), sums.numel())


def convert(sums: Tensor, output: Tensor, fraction_bits: int) -> float:
    """See `SumOperations.convert`."""
    double = output.dtype == torch.float64
    kernel = _native.reduce_convert_f64 if double else _native.reduce_convert_f32
    return kernel(sums.data_ptr(), output.data_ptr(), output.numel(), fraction_bits)


def sum_squares(values: Tensor) -> float:
    """See `SumOperations.sum_squares`."""
    double = values.dtype == torch.float64
    kernel = _native.sum_squares_f64 if double else _native.sum_squares_f32
    return kernel(values.data_ptr(), values.numel())


def bit_sums(parts: Sequence[tuple[Tensor, int]]) -> list[int]:
    """See `SumOperations.bit_sums`."""
    return [
        _BIT_SUMS[values.element_size()](values.data_ptr(), values.numel(), first % 2**64)
        for values, first in parts
    ]


def pack(sums: Tensor, output: Tensor) -> int:
    """See `SumOperations.pack`."""
    return _native.pack_i64(sums.data_ptr(), sums.numel(), output.data_ptr())


def unpack_add(packed: Tensor, base: Tensor | None, output: Tensor) -> int:
    """See `SumOperations.unpack_add`."""
    start = 0 if base is None else base.data_ptr()
    sizes = (output.data_ptr(), output.numel())
    return _native.unpack_add_i64(packed.data_ptr(), packed.numel(), start, *sizes)
