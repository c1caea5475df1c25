"""The keyed permutation of a dataset."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from holdfast import _native

SIZES = [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 65537, 1_000_003]


def permutation(size: int, key: int) -> np.ndarray:
    output = np.empty(size, np.int64)
    _native.permute_indices(output.ctypes.data, 0, size, size, key)
    return output


@pytest.mark.parametrize("size", SIZES)
def test_every_index_is_hit_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permutation(size, key)), np.arange(size))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_images_of_huge_sets_stay_inside_and_apart(
    size: int, key: int, data: st.DataObject
) -> None:
    indices = data.draw(st.sets(st.integers(0, size - 1), max_size=20))
    images = {_native.permute_index(index, size, key) for index in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < size for image in images)


def test_ranges_agree_with_single_indices() -> None:
    whole = permutation(1000, 5)
    assert [_native.permute_index(i, 1000, 5) for i in range(1000)] == whole.tolist()
    part = np.empty(10, np.int64)
    _native.permute_indices(part.ctypes.data, 990, 10, 1000, 5)
    assert np.array_equal(part, whole[990:])


def test_small_sets_take_all_orders_equally_often() -> None:
    orders, counts = np.unique(
        [permutation(4, key) for key in range(24_000)], axis=0, return_counts=True
    )
    assert len(orders) == 24
    statistic = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert statistic < 80  # chi-squared with 23 degrees of freedom exceeds 80 once in 40 million


def test_neighbours_and_keys_are_unrelated() -> None:
    first, second = permutation(100_000, 1), permutation(100_000, 2)
    for a, b in [(first[:-1], first[1:]), (first, second), (first, np.arange(100_000))]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(100_000)


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0), (0, -3)])
def test_indices_outside_the_set_are_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="must"):
        _native.permute_index(index, size, 0)
