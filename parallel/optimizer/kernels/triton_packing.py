"""int64 sums on a CUDA device without the bytes that only repeat the sign, for the wire.

The format is that of csrc/packing.h, bit for bit: runs of 512 elements, a header with each run's
width in bytes, and each run's planes of 8, 4, 2 and 1 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.parallel.optimizer.kernels.operations import OUT_OF_RANGE
from holdfast.parallel.optimizer.kernels.triton_launch import launch, programs

RUN = 512
"""Elements of a run."""
WIDEST = 8
"""The most bytes of an element."""
WARPS = 2
"""Warps of a program, of 8 elements a thread."""
_OUT_OF_RANGE = tl.constexpr(OUT_OF_RANGE)


@triton.jit
def _find_widths(sums, header, count, RUN: tl.constexpr):
    """Store the least bytes that hold every value of a run in two's complement."""
    run = tl.program_id(0)
    place = run.to(tl.int64) * RUN + tl.arange(0, RUN)
    value = tl.load(sums + place, mask=place < count, other=0)
    # 0, -1, 1, -2, ... become 0, 1, 2, 3, ...: the sign's bit and no repetition of it.
    zigzag = ((value << 1) ^ (value >> 63)).to(tl.uint64, bitcast=True)
    largest = tl.max(zigzag, axis=0)
    width = (largest != 0).to(tl.int32)
    for byte in tl.static_range(1, 8):
        width += ((largest >> (8 * byte)) != 0).to(tl.int32)
    tl.store(header + run, width.to(tl.uint8))


@triton.jit
def _pack_run(sums, header, starts, words8, words4, words2, words1, count, RUN: tl.constexpr):
    """Store the planes of a run, which begin at byte starts[run] of the words."""
    run = tl.program_id(0)
    first = run.to(tl.int64) * RUN
    lane = tl.arange(0, RUN)
    elements = tl.minimum(count - first, RUN)
    inside = lane < elements
    width = tl.load(header + run).to(tl.int64)
    at = tl.load(starts + run)
    value = tl.load(sums + first + lane, mask=inside, other=0)
    tl.store(words8 + (at >> 3) + lane, value, mask=inside & (width == 8))
    four = (width & 4) != 0
    tl.store(words4 + (at >> 2) + lane, value.to(tl.int32), mask=inside & four)
    value = tl.where(four, value >> 32, value)
    at = at + elements * (width & 4)
    two = (width & 2) != 0
    tl.store(words2 + (at >> 1) + lane, value.to(tl.int16), mask=inside & two)
    value = tl.where(two, value >> 16, value)
    at = at + elements * (width & 2)
    tl.store(words1 + at + lane, value.to(tl.int8), mask=inside & ((width & 1) != 0))


@triton.jit
def _unpack_run(
    header,
    starts,
    words8,
    words4,
    words2,
    words1,
    base,
    output,
    flags,
    count,
    ADDS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Store the elements of a run, or their sums with `base`."""
    run = tl.program_id(0)
    first = run.to(tl.int64) * RUN
    lane = tl.arange(0, RUN)
    elements = tl.minimum(count - first, RUN)
    inside = lane < elements
    width = tl.load(header + run).to(tl.int64)
    at = tl.load(starts + run)
    value = tl.load(words8 + (at >> 3) + lane, mask=inside & (width == 8), other=0)
    plane = tl.load(words4 + (at >> 2) + lane, mask=inside & ((width & 4) != 0), other=0)
    value = value | (plane.to(tl.int64) & 0xFFFFFFFF)
    at = at + elements * (width & 4)
    plane = tl.load(words2 + (at >> 1) + lane, mask=inside & ((width & 2) != 0), other=0)
    value = value | ((plane.to(tl.int64) & 0xFFFF) << ((width & 4) * 8))
    at = at + elements * (width & 2)
    plane = tl.load(words1 + at + lane, mask=inside & ((width & 1) != 0), other=0)
    value = value | ((plane.to(tl.int64) & 0xFF) << ((width & 6) * 8))
    repeated = 64 - 8 * tl.maximum(width, 1)
    value = (value << repeated) >> repeated
    if ADDS:
        before = tl.load(base + first + lane, mask=inside, other=0)
        total = before + value
        wrapped = ((before ^ total) & (value ^ total)) < 0
        found = tl.where(tl.max(wrapped.to(tl.int32), axis=0) != 0, _OUT_OF_RANGE, 0)
        tl.atomic_or(flags, found.to(tl.int64), mask=found != 0)
        value = total
    tl.store(output + first + lane, value, mask=inside)


def _header_bytes(count: int) -> int:
    return (programs(count, RUN) + 7) // 8 * 8


def _words(packed: Tensor) -> Iterator[Tensor]:
    """The same memory as words of 8, 4, 2 and 1 bytes; planes are aligned to their words."""
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        yield packed[: packed.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _starts(header: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The byte at which each run's planes begin, and the one behind the last of them."""
    sizes = header.long() * RUN
    sizes[-1:] = header[-1:].long() * (count - RUN * (header.numel() - 1))
    ends = sizes.cumsum(0) + _header_bytes(count)
    return ends - sizes, ends[-1]


def pack(sums: Tensor, output: Tensor) -> int:
    """See `SumOperations.pack`. Waits for the device, which knows the number of bytes."""
    count = sums.numel()
    if count == 0:
        return 0
    if output.data_ptr() % WIDEST:
        aligned = torch.empty_like(output)
        written = pack(sums, aligned)
        output[:written] = aligned[:written]
        return written
    runs = programs(count, RUN)
    header = output[:runs]
    output[runs : _header_bytes(count)] = 0
    launch(_find_widths, (runs,), sums, header, count, RUN=RUN, num_warps=WARPS)
    starts, end = _starts(header, count)
    arguments = (sums, header, starts, *_words(output), count)
    launch(_pack_run, (runs,), *arguments, RUN=RUN, num_warps=WARPS)
    return int(end)


def unpack_add(packed: Tensor, base: Tensor | None, output: Tensor) -> int:
    """See `SumOperations.unpack_add`. Waits for the device."""
    count = output.numel()
    if count == 0:
        return 0
    runs = programs(count, RUN)
    if packed.numel() < _header_bytes(count):
        raise ValueError(
            f"the header of {count} packed elements has {_header_bytes(count)} bytes; there are "
            f"{packed.numel()}"
        )
    if packed.data_ptr() % WIDEST:
        packed = packed.clone()
    header = packed[:runs]
    starts, end = _starts(header, count)
    widest, needed = torch.stack([header.max().long(), end]).tolist()
    if widest > WIDEST:
        raise ValueError(f"a run has a width of {widest} bytes; allowed: 0 to {WIDEST}")
    if packed.numel() < needed:
        raise ValueError(
            f"{count} elements of these widths are packed in {needed} bytes; there are "
            f"{packed.numel()}"
        )
    flags = torch.zeros((), dtype=torch.int64, device=output.device)
    adds = base is not None
    arguments = (header, starts, *_words(packed), base if adds else output, output, flags, count)
    launch(_unpack_run, (runs,), *arguments, ADDS=adds, RUN=RUN, num_warps=WARPS)
    return int(flags)
