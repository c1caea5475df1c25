"""The layout algebra against numpy: boxes are index sets, transfers rebuild arrays exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from holdfast.parallel.errors import LayoutError
from holdfast.parallel.layout.boxes import Box, Layout, TensorSpec, covers, transfers, without

SHAPE = (6, 5)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    bounds = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in SHAPE]
    return Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def mask(*several: Box) -> np.ndarray:
    array = np.zeros(SHAPE, dtype=int)
    for box in several:
        array[box.slices] += 1
    return array


@given(boxes(), boxes())
def test_box_arithmetic_is_that_of_index_sets(a: Box, b: Box) -> None:
    common = a.intersect(b)
    both = mask(a) * mask(b)
    assert np.array_equal(mask(common) if common else np.zeros(SHAPE, dtype=int), both)
    assert np.array_equal(mask(*a.minus(b)), mask(a) * (1 - mask(b)))
    assert a.elements == mask(a).sum()
    if b.elements:
        assert a.contains(b) == bool((mask(a) >= mask(b)).all())
    if a.contains(b):
        whole = np.arange(30).reshape(SHAPE)
        assert np.array_equal(whole[a.slices][b.relative_to(a).slices], whole[b.slices])


@given(st.lists(boxes(), max_size=5), st.lists(boxes(), max_size=5))
def test_without_leaves_the_rest(kept: list[Box], taken: list[Box]) -> None:
    left = without(kept, taken)
    expected = mask(*kept) * (mask(*taken) == 0)
    assert np.array_equal(mask(*left), expected)


Holdings = dict[str, tuple[Box, ...]]


@st.composite
def layouts(draw: st.DrawFn, prefix: str) -> Layout:
    holders = draw(st.integers(1, 4))
    return Layout(
        {
            f"{prefix}{holder}": {"w": tuple(draw(st.lists(boxes(), max_size=3)))}
            for holder in range(holders)
        }
    )


@settings(max_examples=200)
@given(layouts("a"), layouts("b"), st.booleans())
def test_transfers_rebuild_the_target_and_move_nothing_twice(
    old: Layout, new: Layout, same_holders: bool
) -> None:
    everything: Mapping[object, Holdings] = {"file": {"w": (Box.whole(SHAPE),)}}
    if same_holders:
        new = Layout({str(k).replace("b", "a"): v for k, v in new.holdings.items()})
    source = Layout({**old.holdings, **everything})
    moves = transfers(source, new, cost=lambda s, _: 100.0 if s == "file" else 1.0)
    values = np.arange(30).reshape(SHAPE)
    for holder, tensors in new.holdings.items():
        own = source.holdings.get(holder, {}).get("w", ())
        array, writes = np.full(SHAPE, -1), np.zeros(SHAPE, dtype=int)
        for box in own:
            array[box.slices] = values[box.slices]
        for move in moves:
            if move.target == holder:
                held = source.holdings[move.source]["w"]
                assert any(box.contains(move.box) for box in held)
                array[move.box.slices] = values[move.box.slices]
                writes[move.box.slices] += 1
        wanted = mask(*tensors["w"]) > 0
        assert np.array_equal(array[wanted], values[wanted])
        assert np.array_equal(writes, (wanted & (mask(*own) == 0)).astype(int))


@given(layouts("a"), layouts("b"))
def test_the_file_is_read_only_for_what_nobody_has(old: Layout, new: Layout) -> None:
    source = Layout({**old.holdings, "file": {"w": (Box.whole(SHAPE),)}})
    held = mask(*(box for tensors in old.holdings.values() for box in tensors["w"])) > 0
    for move in transfers(source, new, cost=lambda s, _: 100.0 if s == "file" else 1.0):
        if move.source == "file":
            assert not held[move.box.slices].any()


def test_equal_holders_share_the_load() -> None:
    rows = [Box((row, 0), (row + 1, 5)) for row in range(6)]
    source = Layout({holder: {"w": (Box.whole(SHAPE),)} for holder in ("a", "b", "c")})
    target = Layout({f"new{row}": {"w": (box,)} for row, box in enumerate(rows)})
    moves = transfers(source, target, cost=lambda *_: 1.0)
    loads = {h: sum(m.box.elements for m in moves if m.source == h) for h in ("a", "b", "c")}
    assert loads == {"a": 10, "b": 10, "c": 10}


def test_many_holders_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work grows with what overlaps, not with holders times boxes: 16 million here."""
    rows = 4096
    old = Layout({r: {"w": (Box((r * 8, 0), (r * 8 + 8, 16)),)} for r in range(rows)})
    new = Layout({("n", r): {"w": (Box((r * 8, 0), (r * 8 + 8, 16)),)} for r in range(rows)})
    compared = 0
    intersect = Box.intersect

    def counted(box: Box, other: Box) -> Box | None:
        nonlocal compared
        compared += 1
        return intersect(box, other)

    monkeypatch.setattr(Box, "intersect", counted)
    moves = transfers(old, new, cost=lambda *_: 1.0)
    assert [(m.source, m.target) for m in moves] == [(r, ("n", r)) for r in range(rows)]
    assert compared < 10 * rows
    compared = 0
    covers([TensorSpec("w", (rows * 8, 16), "float32")], old)
    assert compared < 10 * rows


def test_an_element_that_nobody_holds_is_named() -> None:
    source = Layout({"a": {"w": (Box((0, 0), (3, 5)),)}})
    target = Layout({"b": {"w": (Box((2, 0), (5, 5)),)}})
    with pytest.raises(LayoutError, match=r"w: no source holds \[3:5, 0:5\]"):
        transfers(source, target, cost=lambda *_: 1.0)


def test_covers_names_the_hole() -> None:
    spec = TensorSpec("w", SHAPE, "float32")
    layout = Layout({0: {"w": (Box((0, 0), (6, 2)),)}, 1: {"w": (Box((0, 3), (6, 5)),)}})
    with pytest.raises(LayoutError, match=r"w: no holder has \[0:6, 2:3\].*6 elements"):
        covers([spec], layout)
    covers([spec], Layout({**layout.holdings, 2: {"w": (Box((0, 1), (6, 4)),)}}))


@pytest.mark.parametrize(
    ("holdings", "message"),
    [
        ({0: {"w": (Box((0, 0), (7, 5)),)}}, "outside its shape"),
        ({0: {"w": (Box.whole(SHAPE),), "v": ()}}, None),
        ({0: {"w": (Box.whole(SHAPE),), "v": (Box((0,), (1,)),)}}, "not a tensor"),
    ],
)
def test_covers_refuses_what_does_not_belong(holdings: dict, message: str | None) -> None:
    if message is None:
        covers(
            [TensorSpec("w", SHAPE, "float32"), TensorSpec("v", (0,), "float32")], Layout(holdings)
        )
        return
    with pytest.raises(LayoutError, match=message):
        covers([TensorSpec("w", SHAPE, "float32")], Layout(holdings))


def test_a_box_must_be_an_interval() -> None:
    with pytest.raises(LayoutError, match="not an interval"):
        Box((2,), (1,))
