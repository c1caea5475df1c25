"""`SumOperations` on CUDA devices, each in one pass over memory.

The bits are those of the native kernels whatever a compiler does: gradients are read as bit
patterns and rounded in integers, so no instruction rounds, flushes or fuses floats. Only `convert`
and `sum_squares` compute in floats; they say why their bits are fixed. Flags are joined by atomic
OR, which has no order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.parallel.optimizer.kernels import torch_operations
from holdfast.parallel.optimizer.kernels.triton_launch import launch, programs
from holdfast.parallel.optimizer.kernels.triton_packing import (
    pack as pack,
    unpack_add as unpack_add,
)

_NONFINITE = tl.constexpr(1)
_OUT_OF_RANGE = tl.constexpr(2)
_FORMATS = {
    torch.float16: (torch.int16, 10, 5),
    torch.bfloat16: (torch.int16, 7, 8),
    torch.float32: (torch.int32, 23, 8),
    torch.float64: (torch.int64, 52, 11),
}
"""Float dtype -> the integers of its bits, its bits of mantissa and of exponent."""
BLOCK = 1024
"""Elements that one program adds."""
LANES = 1024
"""Lanes of a sum of squares: lane j of a chunk adds its elements j, j + LANES, ... in turn."""
CHUNK = 8 * LANES
"""Elements whose squares one program adds up."""


@triton.jit
def _rounded(bits, fraction_bits, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr):
    """round(float * 2**fraction_bits), half to even, of the float with these bits.

    A float is (-1)**sign * mantissa * 2**shift with an integer mantissa, so that it is shifted to
    its place: upwards exactly, downwards with rounding.

    Returns:
        int64, zero where it cannot be represented, and whether it is not finite or out of range.
    """
    ALL_ONES: tl.constexpr = (1 << EXPONENT) - 1  # pyrefly: ignore
    # The exponent of a float whose mantissa is an integer as it stands.
    UNSHIFTED: tl.constexpr = (1 << (EXPONENT - 1)) - 1 + MANTISSA  # pyrefly: ignore
    # 32 bits are enough for narrow mantissas, and a GPU has no others: it does 64 in two halves.
    NARROW: tl.constexpr = MANTISSA < 30
    WORD: tl.constexpr = tl.int32 if NARROW else tl.int64  # pyrefly: ignore
    # Shifted so far every mantissa is below a half; further, a shift would be undefined.
    FARTHEST: tl.constexpr = 30 if NARROW else 62  # pyrefly: ignore
    word = bits.to(WORD)
    exponent = (word >> MANTISSA) & ALL_ONES
    mantissa = word & ((1 << MANTISSA) - 1)  # pyrefly: ignore
    mantissa = tl.where(exponent == 0, mantissa, mantissa | (1 << MANTISSA))  # pyrefly: ignore
    shift = tl.maximum(exponent, 1) - UNSHIFTED + fraction_bits
    down = tl.minimum(tl.maximum(-shift, 0), FARTHEST)
    up = tl.minimum(tl.maximum(shift, 0), 62).to(tl.int64)
    # Just below a half, and the rest of it where that makes an odd number even.
    below_half = ((1 << down) - 1) >> 1
    odd = (mantissa >> down) & tl.minimum(down, 1)
    magnitude = ((mantissa + below_half + odd) >> down).to(tl.int64) << up
    nonfinite = exponent == ALL_ONES
    beyond = (shift > 62 - MANTISSA) & (exponent != ALL_ONES)
    sign = (word >> (MANTISSA + EXPONENT)).to(tl.int64)
    signed = (magnitude ^ sign) - sign
    return tl.where(nonfinite | beyond, 0, signed), nonfinite, beyond


@triton.jit
def _add_rounded(
    sums,
    bits,
    inside,
    flags,
    fraction_bits,
    MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Add the rounded floats to a block of sums, and the flags that this raises to `flags`."""
    added, nonfinite, beyond = _rounded(bits, fraction_bits, MANTISSA, EXPONENT)
    if FIRST:
        tl.store(sums, added, mask=inside)
    else:
        before = tl.load(sums, mask=inside, other=0)
        total = before + added
        tl.store(sums, total, mask=inside)
        beyond = beyond | (((before ^ total) & (added ^ total)) < 0)
    # Both are counted in halves of one number, so that the block is reduced once.
    counts = tl.sum(nonfinite.to(tl.int32) + (beyond.to(tl.int32) << 16), axis=0)
    found = tl.where((counts & 0xFFFF) != 0, _NONFINITE, 0)
    found = found | tl.where((counts >> 16) != 0, _OUT_OF_RANGE, 0)
    tl.atomic_or(flags, found.to(tl.int64), mask=found != 0)


@triton.jit(do_not_specialize=["fraction_bits"])
def _accumulate(
    sums,
    gradient,
    flags,
    count,
    fraction_bits,
    MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    bits = tl.load(gradient + place, mask=inside, other=0)
    _add_rounded(sums + place, bits, inside, flags, fraction_bits, MANTISSA, EXPONENT, FIRST)


@triton.jit(do_not_specialize=["fraction_bits"])
def _accumulate_rows(
    sums,
    rows,
    gradient,
    flags,
    row_elements,
    fraction_bits,
    MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source = tl.program_id(0).to(tl.int64)
    target = tl.load(rows + source)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < row_elements
    bits = tl.load(gradient + source * row_elements + place, mask=inside, other=0)
    sums += target * row_elements + place
    _add_rounded(sums, bits, inside, flags, fraction_bits, MANTISSA, EXPONENT, False)


@triton.jit
def _add_integers(sums, other, flags, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    before = tl.load(sums + place, mask=inside, other=0)
    added = tl.load(other + place, mask=inside, other=0)
    total = before + added
    tl.store(sums + place, total, mask=inside)
    wrapped = ((before ^ total) & (added ^ total)) < 0
    found = tl.where(tl.max(wrapped.to(tl.int32), axis=0) != 0, _OUT_OF_RANGE, 0)
    tl.atomic_or(flags, found.to(tl.int64), mask=found != 0)


@triton.jit
def _add_chunk(
    values,
    output,
    totals,
    count,
    scale,
    CONVERTS: tl.constexpr,
    SQUARES: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Store the sum of a chunk of values, or of their squares, or of what `output` gets of them."""
    chunk = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros([LANES], tl.float64)
    for tile in tl.static_range(TILES):
        place = (chunk * TILES + tile) * LANES + tl.arange(0, LANES)
        inside = place < count
        value = tl.load(values + place, mask=inside, other=0)
        if CONVERTS:
            # One rounding from integer to float; the product with a power of two is exact, because
            # a sum other than zero is at least 1 and fraction_bits are at most 62.
            value = value.to(output.dtype.element_ty) * scale
            tl.store(output + place, value, mask=inside)
        wide = value.to(tl.float64)
        if SQUARES:
            wide = wide * wide
        # The launch forbids to fuse square and sum, which would round once instead of twice.
        lanes += wide
    for level in tl.static_range(LEVELS):
        # Halves are added; a sum of two has one order.
        lanes = tl.sum(tl.reshape(lanes, [2, LANES >> (level + 1)]), axis=0)
    tl.store(totals + chunk + tl.arange(0, 1), lanes)


def _bits_of(gradient: Tensor) -> tuple[Tensor, dict[str, int]]:
    if gradient.dtype not in _FORMATS:  # float32 holds the values of all narrower types
        gradient = gradient.float()
    integer, mantissa, exponent = _FORMATS[gradient.dtype]
    return gradient.view(integer), {"MANTISSA": mantissa, "EXPONENT": exponent}


def accumulate(
    sums: Tensor, gradient: Tensor, fraction_bits: int, flags: Tensor, *, first: bool = False
) -> None:
    """See `SumOperations.accumulate`."""
    count = sums.numel()
    if count == 0:
        return
    bits, form = _bits_of(gradient)
    grid = (programs(count, BLOCK),)
    arguments = (sums, bits, flags, count, fraction_bits)
    launch(_accumulate, grid, *arguments, **form, FIRST=first, BLOCK=BLOCK)


def accumulate_rows(
    sums: Tensor, rows: Tensor, gradient: Tensor, fraction_bits: int, flags: Tensor
) -> None:
    """See `SumOperations.accumulate_rows`."""
    if gradient.numel() == 0:
        return
    elements = gradient.numel() // rows.numel()
    bits, form = _bits_of(gradient)
    block = min(BLOCK, max(32, 1 << (elements - 1).bit_length()))
    grid = (rows.numel(), programs(elements, block))
    arguments = (sums, rows, bits, flags, elements, fraction_bits)
    launch(_accumulate_rows, grid, *arguments, **form, BLOCK=block)


def add_integers(sums: Tensor, other: Tensor) -> int:
    """See `SumOperations.add_integers`."""
    count = sums.numel()
    if count == 0:
        return 0
    flags = torch.zeros((), dtype=torch.int64, device=sums.device)
    launch(_add_integers, (programs(count, BLOCK),), sums, other, flags, count, BLOCK=BLOCK)
    return int(flags)


def bit_sums(parts: Sequence[tuple[Tensor, int]]) -> list[int]:
    """See `SumOperations.bit_sums`."""
    return torch_operations.bit_sums(parts)


def convert(sums: Tensor, output: Tensor, fraction_bits: int) -> float:
    """See `SumOperations.convert`; the order of the squares is that of `sum_squares`."""
    return _squares(sums, output, 2.0**-fraction_bits, converts=True)


def sum_squares(values: Tensor) -> float:
    """See `SumOperations.sum_squares`.

    Chunks of `CHUNK` elements have `LANES` lanes; lane j adds the squares of elements j, j + LANES,
    ... in turn. Lanes j and j + LANES / 2 are added, then j and j + LANES / 4, down to one. The
    sums of the chunks are added the same way, without squaring, until one is left. The native
    kernel's order has 16 lanes for all elements, so few that a GPU would be idle.
    """
    return _squares(values, values, 1.0, converts=False)


def _squares(values: Tensor, output: Tensor, scale: float, *, converts: bool) -> float:
    count = output.numel()
    if count == 0:
        return 0.0
    squares = True
    while True:
        chunks = programs(count, CHUNK)
        totals = torch.empty(chunks, dtype=torch.float64, device=output.device)
        launch(
            _add_chunk,
            (chunks,),
            *(values, output, totals, count, scale),
            CONVERTS=converts,
            SQUARES=squares,
            LANES=LANES,
            LEVELS=LANES.bit_length() - 1,
            TILES=CHUNK // LANES,
            enable_fp_fusion=False,
        )
        if chunks == 1:
            return float(totals)
        values, output, count, converts, squares = totals, totals, chunks, False, False
