"""The weighted sum of bits, beside Python's integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from holdfast import _native
from holdfast.parallel.optimizer.kernels import native_operations, torch_operations

KERNELS = {2: _native.bit_sum_16, 4: _native.bit_sum_32, 8: _native.bit_sum_64}
WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def defined(words: list[int], first: int) -> int:
    """The definition, in unbounded integers."""
    odd = 0x9E3779B97F4A7C15
    return sum(w * (((first + i) * odd % 2**64) | 1) for i, w in enumerate(words)) % 2**64


def kernel(words: np.ndarray, first: int) -> int:
    return KERNELS[words.itemsize](words.ctypes.data, len(words), first)


@pytest.mark.parametrize("size", [2, 4, 8])
@given(data=st.data())
def test_the_sum_is_that_of_python(size: int, data: st.DataObject) -> None:
    words = data.draw(st.lists(st.integers(0, 2 ** (8 * size) - 1), max_size=70))
    first = data.draw(st.integers(0, 2**64 - 1))
    array = np.array(words, dtype=WORDS[size])
    assert kernel(array, first) == defined(words, first)
    values = torch.from_numpy(array.view(f"int{8 * size}").copy()).view(FLOATS[size])
    for operations in (native_operations, torch_operations):
        found = operations.bit_sums([(values, first), (values[1:], first + 1)])
        assert found == [defined(words, first), defined(words[1:], first + 1)]
        assert operations.bit_sums([]) == []


@pytest.mark.parametrize("size", [2, 4, 8])
def test_any_flipped_bit_and_any_swap_changes_it(size: int) -> None:
    draw = np.random.default_rng(size)
    words = draw.integers(0, 2 ** (8 * size) - 1, 100, dtype=WORDS[size])
    whole = kernel(words, 5)
    for place in range(len(words)):
        for bit in range(8 * size):
            flipped = words.copy()
            flipped[place] ^= WORDS[size](1 << bit)
            assert kernel(flipped, 5) != whole
    swapped = words.copy()
    swapped[[3, 71]] = swapped[[71, 3]]
    assert kernel(swapped, 5) != whole


def test_sums_of_ranges_add_up_in_any_order() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 1001, dtype=np.uint32)
    parts = [(700, 1001), (0, 13), (13, 700)]
    total = sum(kernel(words[start:stop], 9 + start) for start, stop in parts) % 2**64
    assert total == kernel(words, 9)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        _native.bit_sum_32(0, -1, 0)
