"""Keyed random numbers against Random123's vectors, numpy's arithmetic and the normal
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from holdfast import _native

KEY, STREAM = 0x0123456789ABCDEF, 0xFEDCBA9876543210
U64 = st.integers(0, 2**64 - 1)


def reference_words(count: int, key: int, stream: int, offset: int) -> np.ndarray:
    """Philox4x32-10 from Salmon et al. 2011, in Python's integers."""
    words: list[int] = []
    for block in range(offset // 4, (offset + count + 3) // 4):
        c = [block & 0xFFFFFFFF, block >> 32, stream & 0xFFFFFFFF, stream >> 32]
        k0, k1 = key & 0xFFFFFFFF, key >> 32
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                (p1 >> 32) ^ c[1] ^ k0,
                p1 & 0xFFFFFFFF,
                (p0 >> 32) ^ c[3] ^ k1,
                p0 & 0xFFFFFFFF,
            ]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        words += c
    return np.array(words[offset % 4 :][:count], np.uint32)


def draw(
    kernel: Callable[..., None],
    dtype: type,
    count: int,
    *extra: float,
    key: int = KEY,
    stream: int = STREAM,
    offset: int = 0,
) -> np.ndarray:
    output = np.empty(count, dtype)
    kernel(output.ctypes.data, count, key, stream, offset, *extra)
    return output


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0x85A308D3243F6A88, 0x0370734413198A2E), 0x299F31D0A4093822,
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ((2**64 - 1, 2**64 - 1), 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)  # fmt: skip
def test_random123_vectors(counter: tuple[int, int], key: int, words: str) -> None:
    wanted = np.array([int(word, 16) for word in words.split()], np.uint32)
    block, stream = counter
    if block < 2**61:
        actual = draw(_native.philox_uint32, np.uint32, 4, key=key, stream=stream, offset=4 * block)
        assert np.array_equal(actual, wanted)
    # Vectors beyond the largest offset pin the reference that the next test compares with.
    assert np.array_equal(reference_words(4, key, stream, 4 * block), wanted)


@given(U64, U64, st.integers(0, 2**62), st.integers(0, 70))
def test_words_equal_the_reference(key: int, stream: int, offset: int, count: int) -> None:
    actual = draw(_native.philox_uint32, np.uint32, count, key=key, stream=stream, offset=offset)
    assert np.array_equal(actual, reference_words(count, key, stream, offset))


@pytest.mark.parametrize("offset", [2**34 - 6, 2**34 - 4000])
def test_words_carry_into_the_upper_counter(offset: int) -> None:
    actual = draw(_native.philox_uint32, np.uint32, 5000, offset=offset)
    assert np.array_equal(actual, reference_words(5000, KEY, STREAM, offset))


DRAWS = [
    (_native.philox_uint32, np.uint32, ()),
    (_native.philox_uniform_f32, np.float32, ()),
    (_native.philox_uniform_f64, np.float64, ()),
    (_native.philox_normal_f32, np.float32, (0.5, 0.02)),
    (_native.philox_normal_f64, np.float64, (0.5, 0.02)),
]


@pytest.mark.parametrize(("kernel", "dtype", "extra"), DRAWS)
def test_shards_draw_the_numbers_of_the_whole(
    kernel: Callable[..., None], dtype: type, extra: tuple[float, ...]
) -> None:
    whole = draw(kernel, dtype, 9000, *extra, offset=11)
    cuts = [0, 1, 2, 3, 10, 17, 1000, 2051, 4100, 8999, 9000]
    for start, stop in pairwise(cuts):
        part = draw(kernel, dtype, stop - start, *extra, offset=11 + start)
        assert np.array_equal(part, whole[start:stop])
    for count in range(12):  # nothing is written behind the end
        output = np.full(count + 1, 77, dtype)
        kernel(output.ctypes.data, count, KEY, STREAM, 11, *extra)
        assert np.array_equal(output[:count], whole[:count])
        assert output[count] == 77


def test_uniforms_are_scaled_words() -> None:
    words = draw(_native.philox_uint32, np.uint32, 8000).astype(np.uint64)
    single = draw(_native.philox_uniform_f32, np.float32, 8000)
    assert np.array_equal(single, ((words >> 8) * 2.0**-24).astype(np.float32))
    double = draw(_native.philox_uniform_f64, np.float64, 4000)
    assert np.array_equal(double, ((words[::2] << 32 | words[1::2]) >> 11) * 2.0**-53)
    assert np.array_equal(
        double[1001:], draw(_native.philox_uniform_f64, np.float64, 2999, offset=1001)
    )


def test_normals_are_box_muller_of_the_uniforms() -> None:
    uniform = draw(_native.philox_uniform_f64, np.float64, 200_000).reshape(-1, 2)
    # 1 - u and the quarter turn are exact, so that numpy's last bits are all the difference.
    radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:, 0]))
    turn = uniform[:, 1].astype(np.longdouble) * (
        2 * np.arctan2(np.longdouble(0), np.longdouble(-1))
    )
    wanted = np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1).reshape(-1)
    normal = draw(_native.philox_normal_f64, np.float64, 200_000, 0.0, 1.0)
    assert np.abs(normal - wanted.astype(np.float64)).max() < 4e-15
    shifted = draw(_native.philox_normal_f64, np.float64, 200_000, 3.0, 0.5)
    assert np.array_equal(shifted, 3.0 + 0.5 * normal)
    single = draw(_native.philox_normal_f32, np.float32, 200_000, 3.0, 0.5)
    assert np.array_equal(single, shifted.astype(np.float32))


def test_normals_have_the_moments_and_tails_of_the_distribution() -> None:
    normal = draw(_native.philox_normal_f64, np.float64, 4_000_000, 0.0, 1.0)
    error = 1 / math.sqrt(len(normal))
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((normal**power).mean() - moment) < 5 * error * math.sqrt(variance)
    assert abs((normal[::2] * normal[1::2]).mean()) < 5 * error * math.sqrt(2)
    for bound in (1.0, 2.0, 3.0, 4.0):
        tail = math.erfc(bound / math.sqrt(2))
        assert abs((np.abs(normal) > bound).mean() - tail) < 5 * error * math.sqrt(tail)


@pytest.mark.parametrize(("bits", "dtype"), [("f32", np.float32), ("f64", np.float64)])
def test_a_box_of_normals_is_cut_from_the_whole_matrix(bits: str, dtype: type) -> None:
    normal, box = (getattr(_native, f"philox_normal{x}_{bits}") for x in ("", "_box"))
    whole = draw(normal, dtype, 37 * 53, 0.0, 0.02).reshape(37, 53)
    for rows, columns, top, left in [(37, 53, 0, 0), (5, 53, 30, 0), (37, 7, 0, 46), (3, 1, 9, 13)]:
        output = np.empty((rows, columns), dtype)
        box(output.ctypes.data, rows, columns, top, left, 53, KEY, STREAM, 0.0, 0.02)
        assert np.array_equal(output, whole[top : top + rows, left : left + columns])


DROPOUT = {
    torch.float32: _native.dropout_scale_f32,
    torch.bfloat16: _native.dropout_scale_bf16,
    torch.float64: _native.dropout_scale_f64,
}


@pytest.mark.parametrize("dtype", DROPOUT)
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_keeps_what_the_words_say(
    dtype: torch.dtype, probability: float, in_place: bool
) -> None:
    count, offset = 7003, 13
    words = torch.from_numpy(
        draw(_native.philox_uint32, np.uint32, count, offset=offset).astype(np.int64)
    )
    source = torch.randn(count + 1, generator=torch.Generator().manual_seed(4)).to(dtype)[1:]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = (words >= int(probability * 2**32)).to(wide) * torch.tensor(1 / (1 - probability)).to(
        wide
    )
    if wide == torch.float64:
        factor = (words >= int(probability * 2**32)).double() * (1 / (1 - probability))
    wanted = (source.to(wide) * factor).to(dtype)
    output = source if in_place else torch.empty_like(source)
    DROPOUT[dtype](output.data_ptr(), source.data_ptr(), count, KEY, STREAM, offset, probability)
    assert torch.equal(output, wanted)
    kept = (factor != 0).double().mean().item()
    assert abs(kept - (1 - probability)) < 5 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("dtype", DROPOUT)
def test_dropout_passes_on_what_is_not_finite(dtype: torch.dtype) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    DROPOUT[dtype](values.data_ptr(), values.data_ptr(), 3, KEY, STREAM, 0, 0.0)
    assert values[0].isnan()
    assert values[1:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("probability", [-0.1, 1.0, math.nan])
def test_dropout_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(ValueError, match="allowed: 0 <= probability < 1"):
        _native.dropout_scale_f32(0, 0, 0, KEY, STREAM, 0, probability)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        _native.philox_uint32(0, -1, KEY, STREAM, 0)
