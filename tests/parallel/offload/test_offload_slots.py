"""Room in the offload file: never given twice, always found again."""

from __future__ import annotations

from hypothesis import given, strategies as st

from holdfast.parallel.offload.stores.slots import ALIGNMENT, Slots, rounded


def take(slots: Slots, nbytes: int) -> int:
    missing = slots.missing(nbytes)
    if missing:
        assert slots.take(nbytes) is None
        slots.grow(missing)
    start = slots.take(nbytes)
    assert start is not None
    return start


@given(
    st.lists(
        st.one_of(st.integers(1, 40_000), st.floats(0, 1, exclude_max=True)),
        max_size=60,
    )
)
def test_slots_never_overlap_and_all_room_comes_back(operations: list[int | float]) -> None:
    """A number of bytes takes a slot; a fraction gives back the slot at that place in the list."""
    slots = Slots()
    held: list[tuple[int, int]] = []
    for operation in operations:
        if isinstance(operation, int):
            start = take(slots, operation)
            assert start % ALIGNMENT == 0
            assert start + operation <= slots.capacity
            stop = start + rounded(operation)
            assert all(stop <= a or b <= start for a, b in held)
            held.append((start, stop))
        elif held:
            start, _ = held.pop(int(operation * len(held)))
            slots.give(start)
        assert slots.used == sum(b - a for a, b in held)
    for start, _ in held:
        slots.give(start)
    assert slots.used == 0
    if slots.capacity:
        assert slots.take(slots.capacity) == 0


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=30), st.booleans())
def test_repeated_steps_need_no_more_room(sizes: list[int], reverse: bool) -> None:
    slots = Slots()
    grown = []
    for _ in range(4):
        starts = [take(slots, nbytes) for nbytes in sizes]
        for start in reversed(starts) if reverse else starts:
            slots.give(start)
        grown.append(slots.capacity)
    assert grown == [sum(map(rounded, sizes))] * 4
