"""Triton's kernels against the native ones, bit for bit: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.parallel.optimizer.kernels import (
    NONFINITE,
    OUT_OF_RANGE,
    dispatch,
    native_operations,
    operations_of,
    torch_operations,
    triton_packing,
    triton_sums,
)
from holdfast.parallel.optimizer.kernels.operations import SumOperations
from holdfast.parallel.optimizer.packing import packed_bytes_bound

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float8_e5m2]
COUNTS = [0, 1, 5, 1023, 1024, 1025, 3000]
BITS = [0, 1, 20, 44, 61, 62]


def random_values(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Values of all sizes, which are seldom out of range."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(6 * torch.randn(count, generator=generator))
    values = torch.randn(count, generator=generator, dtype=torch.float64) * scale
    return values.clamp(-40000, 40000).to(dtype)


def special_values(dtype: torch.dtype, bits: int) -> list[float]:
    """Zeros, halves, denormals, and both sides of every limit."""
    limit = 2.0 ** (63 - bits)
    info = torch.finfo(dtype)
    halves = [(n + 0.5) * 2.0**-bits for n in range(4)] + [2.0**-bits]
    near = [limit * (1 - info.eps), limit, limit * (1 - info.eps / 2), limit * (1 + info.eps)]
    small = [0.0, info.smallest_normal, info.smallest_normal * info.eps, info.tiny * 1.5]
    large = [info.max, limit / 2, math.inf]
    found = [*halves, *near, *small, *large, math.nan]
    return [*found, *(-value for value in found)]


def flag() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def random_sums(count: int) -> Tensor:
    return torch.randint(-(2**61), 2**61, (count,), generator=torch.Generator().manual_seed(7))


def both(
    sums: Tensor, gradient: Tensor, bits: int, *, first: bool = False
) -> tuple[tuple[Tensor, int], ...]:
    """The sums and flags of the native kernel, and those of Triton's."""
    results = []
    for operations, device in ((native_operations, "cpu"), (triton_sums, DEVICE)):
        total, flags = sums.clone().to(device), flag().to(device)
        operations.accumulate(total, gradient.to(device), bits, flags, first=first)
        results.append((total.cpu(), int(flags)))
    return tuple(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulated_sums_have_the_bits_of_the_native_kernel(dtype: torch.dtype) -> None:
    for count, bits in zip(COUNTS, [*BITS, 44], strict=True):
        native, ours = both(random_sums(count), random_values(count, count, dtype), bits)
        assert torch.equal(ours[0], native[0])
        assert ours[1] == native[1]


@pytest.mark.parametrize("dtype", DTYPES[:4])
@pytest.mark.parametrize("bits", [0, 20, 62])
def test_every_kind_of_float_is_rounded_and_flagged_alike(dtype: torch.dtype, bits: int) -> None:
    gradient = torch.tensor(special_values(dtype, bits), dtype=torch.float64).to(dtype)
    together = both(torch.zeros(gradient.numel(), dtype=torch.int64), gradient, bits)
    assert torch.equal(together[0][0], together[1][0])
    assert together[0][1] == together[1][1]
    assert together[1][1] & NONFINITE
    if bits == 20:
        for value in gradient:
            native, ours = both(torch.zeros(1, dtype=torch.int64), value.reshape(1), bits)
            assert ours[1] == native[1], float(value)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_first_gradient_replaces_whatever_stands_in_the_sums(dtype: torch.dtype) -> None:
    special = torch.tensor(special_values(dtype, 20), dtype=torch.float64).to(dtype)
    gradient = torch.cat([random_values(5000, 11, dtype), special])
    for part in (gradient, gradient[:5000], gradient[:1]):
        added, _ = both(torch.zeros(part.numel(), dtype=torch.int64), part, 20)
        native, ours = both(random_sums(part.numel()), part, 20, first=True)
        assert torch.equal(native[0], added[0])
        assert torch.equal(ours[0], added[0])
        assert native[1] == ours[1] == added[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_of_16_bits_are_rounded_alike(dtype: torch.dtype) -> None:
    step = 1 if DEVICE == "cuda" else 7
    gradient = torch.arange(-(2**15), 2**15, step, dtype=torch.int16).view(dtype)
    native, ours = both(torch.zeros(gradient.numel(), dtype=torch.int64), gradient, 13)
    assert torch.equal(ours[0], native[0])
    assert ours[1] == native[1]


def test_an_overflowing_sum_wraps_and_is_flagged() -> None:
    edge = torch.tensor([2**63 - 1, -(2**63), 0], dtype=torch.int64)
    native, ours = both(edge, torch.tensor([1.0, -1.0, 5.0]), 0)
    assert torch.equal(ours[0], native[0])
    assert ours[1] == native[1] == OUT_OF_RANGE
    assert both(edge, torch.tensor([-1.0, 1.0, 5.0]), 0)[1][1] == 0


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(("count", "elements"), [(0, 4), (3, 1), (4, 37), (2, 1030)])
def test_rows_are_added_where_they_belong(dtype: torch.dtype, count: int, elements: int) -> None:
    rows = torch.tensor([4, 0, 5, 2][:count], dtype=torch.int64)
    gradient = random_values(count * elements, 3, dtype).view(count, elements)
    if count == 4:
        gradient[1, 36] = math.inf
    results = []
    for operations, device in ((native_operations, "cpu"), (triton_sums, DEVICE)):
        sums, flags = random_sums(6 * elements).view(6, elements).to(device), flag().to(device)
        operations.accumulate_rows(sums, rows.to(device), gradient.to(device), 44, flags)
        results.append((sums.cpu(), int(flags)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == (NONFINITE if count == 4 else 0)


@pytest.mark.parametrize("count", [0, 1, 1025])
def test_integers_are_added_and_overflow_is_flagged(count: int) -> None:
    sums, other = random_sums(count), random_sums(count).flip(0)
    total = sums.clone().to(DEVICE)
    assert triton_sums.add_integers(total, other.to(DEVICE)) == 0
    assert torch.equal(total.cpu(), sums + other)
    if count:
        total[-1], extreme = 2**63 - 1, torch.ones(count, dtype=torch.int64, device=DEVICE)
        assert triton_sums.add_integers(total, extreme) == OUT_OF_RANGE
        assert int(total[-1]) == -(2**63)


def squares_in_order(values: np.ndarray) -> float:
    """The order that `triton_sums.sum_squares` states, in numpy."""
    terms = values.astype(np.float64) ** 2
    while True:
        totals = []
        for start in range(0, len(terms), triton_sums.CHUNK):
            chunk = np.zeros(triton_sums.CHUNK)
            part = terms[start : start + triton_sums.CHUNK]
            chunk[: len(part)] = part
            lanes = np.zeros(triton_sums.LANES)
            for tile in chunk.reshape(-1, triton_sums.LANES):
                lanes = lanes + tile
            while len(lanes) > 1:
                lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
            totals.append(lanes[0])
        if len(totals) == 1:
            return float(totals[0])
        terms = np.array(totals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "bits"), [(0, 44), (1, 0), (1025, 62), (8193, 20), (20000, 44)])
def test_sums_are_rounded_once_and_squares_added_in_the_stated_order(
    dtype: torch.dtype, count: int, bits: int
) -> None:
    # 2**54 + 2**30 + 1 rounds down when it goes to float32 through float64.
    ties = torch.tensor([2**54 + 2**30 + 1, -(2**54) - 2**30 - 1, 2**63 - 1, -(2**63), 1, -1, 0])
    sums = random_sums(count)
    sums[: len(ties)] = ties[:count]
    native = torch.empty(count, dtype=dtype)
    near = native_operations.convert(sums, native, bits)
    ours = torch.empty(count, dtype=dtype, device=DEVICE)
    squares = triton_sums.convert(sums.to(DEVICE), ours, bits)
    assert torch.equal(ours.cpu(), native)
    assert squares == (squares_in_order(native.numpy()) if count else 0.0)
    assert squares == pytest.approx(near, rel=1e-12)
    assert triton_sums.sum_squares(ours) == squares
    by_torch = torch.empty(count, dtype=dtype)
    assert torch_operations.convert(sums, by_torch, bits) == pytest.approx(near, rel=1e-12)
    assert torch.equal(by_torch, native)


def packed_by_definition(values: list[int]) -> bytes:
    """The format as it is described, element by element."""
    header, payload = b"", b""
    for start in range(0, len(values), triton_packing.RUN):
        run = values[start : start + triton_packing.RUN]
        least = next(w for w in range(9) if all(fits(value, w) for value in run))
        header += bytes([least])
        low = 0
        for size in (8, 4, 2, 1):
            if least & size:
                for value in run:
                    whole = value.to_bytes(8, "little", signed=True)
                    payload += whole[low : low + size]
                low += size
    return header + bytes(-len(header) % 8) + payload


def fits(value: int, width: int) -> bool:
    return value == 0 if width == 0 else -(2 ** (8 * width - 1)) <= value < 2 ** (8 * width - 1)


def runs_of_widths() -> Tensor:
    """Runs of every width, with the extremes of each, and a shorter one at the end."""
    generator = torch.Generator().manual_seed(5)
    runs = [torch.zeros(triton_packing.RUN, dtype=torch.int64)]
    for width in range(1, 9):
        low, high = -(2 ** (8 * width - 1)), 2 ** (8 * width - 1) - 1
        run = torch.randint(low, high, (triton_packing.RUN,), generator=generator)
        run[:2] = torch.tensor([low, high])
        runs.append(run)
    runs.append(torch.full((triton_packing.RUN,), -1))
    runs.append(torch.arange(-1001, 1000) * 2**40)
    return torch.cat(runs)


@pytest.mark.parametrize("operations", [triton_sums, torch_operations])
@pytest.mark.parametrize("count", [0, 1, triton_packing.RUN - 1, triton_packing.RUN + 1, None])
def test_packed_sums_have_the_stated_form_and_come_back(
    operations: SumOperations, count: int | None
) -> None:
    sums = runs_of_widths().flip(0)[:count].contiguous()
    room = torch.full((packed_bytes_bound(sums.numel()) + 1,), 0xAA, dtype=torch.uint8)
    output = room.clone().to(DEVICE)[1:]  # not aligned
    packed = output[: operations.pack(sums.to(DEVICE), output)]
    assert bytes(packed.cpu().numpy()) == packed_by_definition(sums.tolist())
    native = room[: native_operations.pack(sums, room)]
    assert torch.equal(packed.cpu(), native)
    alone = torch.full_like(sums, 3).to(DEVICE)
    assert operations.unpack_add(packed, None, alone) == 0
    assert torch.equal(alone.cpu(), sums)
    base = (random_sums(sums.numel()) >> 8).to(DEVICE)
    wanted = torch.empty_like(sums)
    flags = native_operations.unpack_add(native, base.cpu(), wanted)
    assert flags == (OUT_OF_RANGE if count is None else 0)
    assert operations.unpack_add(packed, base, base) == flags
    assert torch.equal(base.cpu(), wanted)


def test_what_was_not_packed_is_refused_before_anything_is_written() -> None:
    sums = torch.arange(5000)
    output = torch.zeros(packed_bytes_bound(5000), dtype=torch.uint8, device=DEVICE)
    packed = output[: triton_packing.pack(sums.to(DEVICE), output)]
    kept = torch.full((5000,), 9, device=DEVICE)
    with pytest.raises(ValueError, match="packed in"):
        triton_packing.unpack_add(packed[:-1], None, kept)
    with pytest.raises(ValueError, match="header"):
        triton_packing.unpack_add(packed[:7], None, kept)
    packed[1] = 9
    with pytest.raises(ValueError, match="a width of 9 bytes"):
        triton_packing.unpack_add(packed, None, kept)
    assert kept.unique().tolist() == [9]


def test_a_device_has_one_set_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operations_of(torch.device("cpu")) is native_operations
    assert operations_of(torch.device("meta")) is torch_operations
    for works, operations in ((True, triton_sums), (False, torch_operations)):
        monkeypatch.setattr(dispatch, "_triton_works", lambda device, works=works: works)
        assert operations_of(torch.device("cuda")) is operations


def test_where_triton_does_not_work_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(sums: Tensor, other: Tensor) -> int:
        raise RuntimeError("trace\nFailed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_sums, "add_integers", fails)
    works = dispatch._triton_works.__wrapped__
    with caplog.at_level(logging.WARNING):
        assert not works(torch.device(DEVICE))
    (line,) = caplog.messages
    assert "(Failed to find C compiler): torch's operations" in line
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert works(torch.device(DEVICE))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not works(torch.device(DEVICE))
