"""The exact reduction against Python's integers and fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from holdfast import _native

NONFINITE, OUT_OF_RANGE = 1, 2
Accumulate = Callable[[int, int, int, int], int]
KERNELS: dict[torch.dtype, Accumulate] = {
    torch.float32: _native.accumulate_f32,
    torch.bfloat16: _native.accumulate_bf16,
    torch.float64: _native.accumulate_f64,
}
DTYPES = list(KERNELS)


def wrapped(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def expected(sums: list[int], gradient: list[float], bits: int) -> tuple[list[int], int]:
    """The definition, in unbounded integers: Fraction's round is exact and half to even."""
    result, flags = list(sums), 0
    for i, value in enumerate(gradient):
        if not math.isfinite(value):
            flags |= NONFINITE
            continue
        scaled = Fraction(value) * 2**bits
        if abs(scaled) >= 2**63:
            flags |= OUT_OF_RANGE
            continue
        total = sums[i] + round(scaled)
        result[i] = wrapped(total)
        if total != result[i]:
            flags |= OUT_OF_RANGE
    return result, flags


def accumulated(sums: list[int], gradient: Tensor, bits: int) -> tuple[list[int], int]:
    target = torch.tensor(sums, dtype=torch.int64)
    kernel = KERNELS[gradient.dtype]
    flags = kernel(target.data_ptr(), gradient.data_ptr(), gradient.numel(), bits)
    return target.tolist(), flags


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_accumulate_is_integer_addition_of_rounded_gradients(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    width = 64 if dtype == torch.float64 else 32
    values = st.one_of(
        st.floats(width=width),
        st.floats(-1.0, 1.0, width=width),
        st.sampled_from([0.0, -0.0, 2.0**19, -(2.0**19), 127.5, 128.0, 2.0**-45, 3 * 2.0**-45]),
    )
    drawn = data.draw(st.lists(values, min_size=1, max_size=40))
    bits = data.draw(st.sampled_from([0, 1, 20, 44, 51, 62]))
    sums = data.draw(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(drawn), max_size=len(drawn))
    )
    gradient = torch.tensor(drawn, dtype=torch.float64).to(dtype)
    assert accumulated(sums, gradient, bits) == expected(sums, gradient.double().tolist(), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 1023, 1024, 2999])
@pytest.mark.parametrize(
    ("special", "flag"),
    [(math.nan, NONFINITE), (-math.inf, NONFINITE), (2.0**19, OUT_OF_RANGE), (300.0, 0)],
)
def test_one_special_gradient_among_many_is_noticed(
    dtype: torch.dtype, where: int, special: float, flag: int
) -> None:
    gradient = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradient[where] = special
    result, flags = accumulated([7] * 3000, gradient, 44)
    assert flags == flag
    assert result == expected([7] * 3000, gradient.double().tolist(), 44)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_round_to_even(dtype: torch.dtype) -> None:
    gradient = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], dtype=dtype)
    assert accumulated([0] * 6, gradient, 0) == ([0, 2, 2, 0, -2, -2], 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_and_alignment_gives_the_same_sums(dtype: torch.dtype) -> None:
    gradient = torch.randn(1200, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole, _ = accumulated([0] * 1200, gradient, 44)
    target = torch.zeros(1300, dtype=torch.int64)
    for length in (*range(40), 1023, 1024, 1025):
        for shift in range(5):
            target.zero_()
            KERNELS[dtype](target[shift:].data_ptr(), gradient[shift:].data_ptr(), length, 44)
            assert target[shift : shift + length].tolist() == whole[shift : shift + length]
            assert not target[:shift].any()
            assert not target[shift + length :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_added_where_they_belong(dtype: torch.dtype) -> None:
    kernel = getattr(_native, KERNELS[dtype].__name__.replace("accumulate", "accumulate_rows"))
    gradient = torch.randn(3, 37, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows = torch.tensor([4, 0, 2])
    sums = torch.arange(5 * 37).reshape(5, 37)
    wanted = sums.clone()
    wanted[rows] += torch.round(gradient.double() * 2.0**44).long()
    assert kernel(sums.data_ptr(), gradient.data_ptr(), rows.data_ptr(), 3, 37, 44) == 0
    assert torch.equal(sums, wanted)
    gradient[1, 36] = math.inf
    assert kernel(sums.data_ptr(), gradient.data_ptr(), rows.data_ptr(), 3, 37, 44) == NONFINITE


def test_sum_overflow_is_flagged() -> None:
    assert accumulated([2**63 - 1], torch.tensor([1.0]), 0) == ([-(2**63)], OUT_OF_RANGE)
    assert accumulated([-(2**63)], torch.tensor([-1.0]), 0) == ([2**63 - 1], OUT_OF_RANGE)


@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2), min_size=1, max_size=40))
def test_integer_addition_flags_overflow(pairs: list[tuple[int, int]]) -> None:
    sums = torch.tensor([a for a, _ in pairs])
    other = torch.tensor([b for _, b in pairs])
    totals = [a + b for a, b in pairs]
    flags = _native.add_i64(sums.data_ptr(), other.data_ptr(), len(pairs))
    assert sums.tolist() == [wrapped(total) for total in totals]
    assert flags == (OUT_OF_RANGE if any(wrapped(x) != x for x in totals) else 0)


def nearest_float32(value: Fraction) -> float:
    """Rounded once: the nearest of the candidates around a first guess, ties to the even
    mantissa.
    """
    guess = np.float32(float(value))
    around = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    return float(
        min(around, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.int32)) & 1))
    )


# 2**54 + 2**30 + 1 rounds down when it goes through float64 first.
TIES = st.builds(lambda e, low: 2**e + 2 ** (e - 24) + low, st.integers(53, 62), st.integers(-1, 1))


@given(
    st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), TIES), min_size=1, max_size=40),
    st.sampled_from([0, 20, 44, 62]),
)
def test_sums_are_rounded_once_to_float32(values: list[int], bits: int) -> None:
    sums = torch.tensor(values)
    output = torch.empty(len(values))
    _native.reduce_convert_f32(sums.data_ptr(), output.data_ptr(), len(values), bits)
    assert output.tolist() == [nearest_float32(Fraction(x, 2**bits)) for x in values]


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40), st.sampled_from([0, 44])
)
def test_sums_are_rounded_once_to_float64(values: list[int], bits: int) -> None:
    sums = torch.tensor(values)
    output = torch.empty(len(values), dtype=torch.float64)
    _native.reduce_convert_f64(sums.data_ptr(), output.data_ptr(), len(values), bits)
    assert output.tolist() == [float(Fraction(x, 2**bits)) for x in values]


def squares_in_order(values: np.ndarray) -> float:
    lanes = np.zeros(16)
    for start in range(0, len(values), 16):
        piece = values[start : start + 16].astype(np.float64)
        lanes[: len(piece)] += piece * piece
    for width in (8, 4, 2, 1):
        lanes = lanes[:width] + lanes[width:]
    return float(lanes[0])


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "squares", "convert"),
    [
        (np.float32, _native.sum_squares_f32, _native.reduce_convert_f32),
        (np.float64, _native.sum_squares_f64, _native.reduce_convert_f64),
    ],
)
def test_squares_are_added_in_the_stated_order(
    length: int, shift: int, dtype: type, squares: Callable, convert: Callable
) -> None:
    draw = np.random.default_rng(3)
    values = draw.standard_normal(length + shift).astype(dtype)[shift:]
    assert squares(values.ctypes.data, length) == squares_in_order(values)
    sums = draw.integers(-(2**50), 2**50, length + shift)[shift:]
    output = np.empty(length + shift, dtype)[shift:]
    total = convert(sums.ctypes.data, output.ctypes.data, length, 44)
    assert total == squares_in_order(output)


@pytest.mark.parametrize("bits", [-1, 63])
def test_fraction_bits_outside_the_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="allowed: 0 to 62"):
        _native.accumulate_f32(0, 0, 0, bits)
