"""The layout algebra: the boxes that each holder has, and the moves from one layout to another.

Every shard is a box, a half-open interval per dim, never a flat range. Holders are opaque: the
same code serves ranks and files. Pure; needs no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import accumulate
from math import prod
from operator import sub
from typing import Any

from holdfast.parallel.errors import LayoutError

Holder = Hashable


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open interval per dim of a logical tensor; a scalar's box has no dim."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or any(
            a < 0 or b < a for a, b in zip(self.start, self.stop, strict=False)
        ):
            raise LayoutError(
                f"a box from {self.start} to {self.stop} is not an interval per dimension; starts "
                "are 0 or more and stops are not below them"
            )

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box of all elements of a tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of this box in the logical tensor."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes; None if there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def around(self, other: Box) -> Box:
        """The smallest box that contains both."""
        start = tuple(map(min, self.start, other.start))
        return Box(start, tuple(map(max, self.stop, other.stop)))

    def contains(self, other: Box) -> bool:
        return all(a <= b for a, b in zip(self.start, other.start, strict=True)) and all(
            a >= b for a, b in zip(self.stop, other.stop, strict=True)
        )

    def relative_to(self, outer: Box) -> Box:
        """This box in the coordinates of `outer`, which contains it."""
        if not outer.contains(self):
            raise LayoutError(f"box {self} does not lie in {outer}")
        return Box(
            tuple(a - o for a, o in zip(self.start, outer.start, strict=True)),
            tuple(b - o for b, o in zip(self.stop, outer.start, strict=True)),
        )

    def minus(self, other: Box) -> tuple[Box, ...]:
        """The rest of this box without `other`: disjoint boxes, at most two per dim."""
        common = self.intersect(other)
        if common is None:
            return (self,)
        left: list[Box] = []
        start, stop = list(self.start), list(self.stop)
        for dim in range(len(start)):
            if start[dim] < common.start[dim]:
                below = stop.copy()
                below[dim] = common.start[dim]
                left.append(Box(tuple(start), tuple(below)))
            if common.stop[dim] < stop[dim]:
                above = start.copy()
                above[dim] = common.stop[dim]
                left.append(Box(tuple(above), tuple(stop)))
            start[dim], stop[dim] = common.start[dim], common.stop[dim]
        return tuple(left)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def even_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open part `index` of `size` rows cut into `parts`, which differ by one at most."""
    return index * size // parts, (index + 1) * size // parts


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A logical tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """"float32", "bfloat16", …"""


@dataclass(frozen=True, slots=True)
class Layout:
    """The boxes of each tensor that each holder has."""

    holdings: Mapping[Any, Mapping[str, tuple[Box, ...]]]

    def by_name(self) -> dict[str, list[tuple[Holder, Box]]]:
        """The same by tensor: every (holder, box), in the order of the holders."""
        found: dict[str, list[tuple[Holder, Box]]] = {}
        for holder, tensors in self.holdings.items():
            for name, boxes in tensors.items():
                found.setdefault(name, []).extend((holder, box) for box in boxes)
        return found


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that must move: a box of a tensor from one holder to another."""

    name: str
    box: Box
    source: Holder
    target: Holder


def without(boxes: Iterable[Box], taken: Iterable[Box]) -> list[Box]:
    """The rest of `boxes` without `taken`; disjoint if `boxes` are."""
    left = [box for box in boxes if box.elements]
    for hole in taken:
        left = [rest for box in left for rest in box.minus(hole)]
    return left


def covers(specs: Iterable[TensorSpec], layout: Layout) -> None:
    """Check that every element of every tensor is held at least once.

    Raises:
        LayoutError: there is a hole (the message names tensor and box), a box lies outside its
            tensor, or a tensor is unknown.
    """
    held = layout.by_name()
    known = set()
    for spec in specs:
        known.add(spec.name)
        whole = Box.whole(spec.shape)
        # Taken in order, so that the rest stays a few boxes however many are held.
        boxes = sorted({box for _, box in held.get(spec.name, [])}, key=lambda box: box.start)
        for box in boxes:
            if len(box.start) != len(spec.shape) or not whole.contains(box):
                raise LayoutError(
                    f"{spec.name}: box {box} lies outside its shape {list(spec.shape)}"
                )
        holes = without([whole], boxes)
        if holes:
            raise LayoutError(
                f"{spec.name}: no holder has {holes[0]} of its shape {list(spec.shape)} "
                f"({sum(hole.elements for hole in holes)} elements are missing in all)"
            )
    for name in held:
        if name not in known:
            raise LayoutError(f"{name} is held but is not a tensor of this model")


def transfers(
    source: Layout, target: Layout, *, cost: Callable[[Holder, Holder], float]
) -> list[Transfer]:
    """The moves that turn `source` into `target`.

    Only elements that a target holder lacks are moved, each from the cheapest source that has it.
    Among equally cheap sources, the one that has sent least sends next. A holder's own elements
    cost nothing and are not listed. Equal inputs give equal lists on every rank.

    Args:
        cost: (source holder, target holder) -> relative cost of an element, e.g. 1 in a node, 10
            between nodes, 100 from a file.
    Returns:
        Disjoint boxes per target, in the target's order.
    Raises:
        LayoutError: no source holds an element.
    """
    held = {name: _BoxIndex(boxes) for name, boxes in source.by_name().items()}
    nothing = _BoxIndex([])
    sent: dict[Holder, int] = {}
    moves: list[Transfer] = []
    for holder, tensors in target.holdings.items():
        own = source.holdings.get(holder, {})
        for name, boxes in tensors.items():
            had = _BoxIndex((holder, box) for box in own.get(name, ()))
            asked = _BoxIndex(enumerate(boxes))
            for place, box in enumerate(boxes):
                taken = [part for part, _ in had.overlaps(box)]
                # An earlier box of the same target may ask for a part already; it is not asked for
                # again.
                taken += [part for part, by in asked.overlaps(box) if by[0][0] < place]
                for wanted in without([box], taken):
                    moves += _fetch(name, wanted, holder, held.get(name, nothing), cost, sent)
    return moves


class _BoxIndex:
    """The holders of the boxes of one tensor, found by rows; each distinct box is kept once."""

    def __init__(self, held: Iterable[tuple[Holder, Box]]) -> None:
        holders: dict[Box, list[tuple[int, Holder]]] = {}
        for order, (holder, box) in enumerate(held):
            if box.elements:
                holders.setdefault(box, []).append((order, holder))
        self._held = sorted(holders.items(), key=lambda item: item[0].start)
        rows = [_rows(box) for box, _ in self._held]
        self._starts = [first for first, _ in rows]
        self._furthest = list(accumulate((last for _, last in rows), max))

    def overlaps(self, wanted: Box) -> Iterator[tuple[Box, list[tuple[int, Holder]]]]:
        """The parts of `wanted` that are held, each with its (place in the list, holder) pairs."""
        first, last = _rows(wanted)
        # Boxes before the first whose furthest row reaches `wanted` all end before it.
        low, high = bisect_right(self._furthest, first), bisect_left(self._starts, last)
        for box, holders in self._held[low:high]:
            common = box.intersect(wanted)
            if common is not None:
                yield common, holders


def _rows(box: Box) -> tuple[int, int]:
    return (box.start[0], box.stop[0]) if box.start else (0, 1)


def _fetch(
    name: str,
    wanted: Box,
    target: Holder,
    held: _BoxIndex,
    cost: Callable[[Holder, Holder], float],
    sent: dict[Holder, int],
) -> list[Transfer]:
    """The moves that bring one box: largest parts of the cheapest sources first."""
    offers = [
        (cost(holder, target), sent.get(holder, 0), -common.elements, order, holder, common)
        for common, holders in held.overlaps(wanted)
        for order, holder in holders
        if holder != target
    ]
    heapify(offers)
    moves: list[Transfer] = []
    missing = [wanted]
    while missing:
        if not offers:
            raise LayoutError(f"{name}: no source holds {missing[0]}, which {target} needs")
        price, was_sent, was_gain, order, holder, common = heappop(offers)
        parts = [part for box in missing if (part := box.intersect(common)) is not None]
        gain = sum(part.elements for part in parts)
        if not gain:
            continue
        # An offer's key only grows, so one that has not grown since it was queued is the best.
        if (sent.get(holder, 0), -gain) != (was_sent, was_gain):
            heappush(offers, (price, sent.get(holder, 0), -gain, order, holder, common))
            continue
        moves += [Transfer(name, part, holder, target) for part in parts]
        sent[holder] = sent.get(holder, 0) + gain
        missing = without(missing, [common])
    return moves
