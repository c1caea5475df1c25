"""What is sent of a step's storages: the share, evenly, and not the end that comes back at once."""

from __future__ import annotations

import pytest

from holdfast.parallel.offload.hooks.selection import Selection
from holdfast.parallel.offload.policy import Amount, Bounds

STORAGES, BYTES = 20, 1 << 20


def wanted(selection: Selection) -> list[bool]:
    return [selection.wants(BYTES, (number + 1) * BYTES) for number in range(STORAGES)]


@pytest.mark.parametrize(("share", "every"), [(1.0, 1), (0.5, 2), (0.25, 4)])
def test_a_share_is_taken_evenly(share: float, every: int) -> None:
    selection = Selection(Bounds(share, share))
    selection.open("layer", at_once=False)
    assert wanted(selection) == [(n + 1) % every == 0 for n in range(STORAGES)]


def test_nothing_is_sent_of_a_share_of_nothing() -> None:
    selection = Selection(Bounds(0.0, 0.0))
    selection.open("layer", at_once=False)
    assert not any(wanted(selection))


def test_the_largest_forward_pass_is_remembered_by_kind() -> None:
    selection = Selection(Bounds())
    assert selection.largest_bytes == 0
    selection.complete("small", 3)
    selection.complete("large", 7)
    selection.complete("large", 5)
    assert selection.largest_bytes == 5


@pytest.mark.parametrize("at_once", [True, False])
def test_the_end_of_a_pass_stays_where_its_backward_pass_comes_at_once(at_once: bool) -> None:
    selection = Selection(Bounds(1.0, 1.0))
    selection.amount = Amount(share=1.0, tail_bytes=5 * BYTES)
    selection.complete("layer", STORAGES * BYTES)
    selection.open("layer", at_once=at_once)
    assert wanted(selection) == [not at_once or number < STORAGES - 5 for number in range(STORAGES)]
