"""A fence protects shadowed blocks first and owned blocks after them, each asked by position."""

from __future__ import annotations

import pytest

from holdfast.parallel.optimizer.fence import BlockNumbers


def test_owned_blocks_follow_the_shadowed_ones() -> None:
    asked: list[int] = []

    def fence(number: int) -> int:
        asked.append(number)
        return 6

    numbers = BlockNumbers(shadowed=4, owned=3)
    of_shadows, of_owned = numbers.fence_of_shadows(fence), numbers.fence_of_owned(fence)
    assert of_shadows is not None
    assert of_shadows(1) == 6
    assert of_owned(1) == 2, "number 6 of all is the third owned block"
    assert asked == [1, 5]
    assert numbers.of_owned(numbers.owned) == 7, "the number of all blocks"


@pytest.mark.parametrize("position", [0, 2])
def test_where_no_shadow_is_saved_owned_blocks_count_from_zero(position: int) -> None:
    numbers = BlockNumbers(shadowed=0, owned=3)
    assert numbers.fence_of_shadows(lambda number: number) is None
    assert numbers.fence_of_owned(lambda number: number)(position) == position
