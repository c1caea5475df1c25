"""Covering arrays: a few choices in which every two values occur together that may."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

Value = str | int | bool
Choice = Mapping[str, Value]
"""The value of each factor, by its name. A factor without effect beside the others is left out, so
that its values do not count as tried."""
Pair = tuple[tuple[str, Value], tuple[str, Value]]
"""Two factors with a value each, in the order of the choice."""


def _always(_: Choice) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Factor:
    """What can be chosen: a name and its values."""

    name: str
    values: tuple[Value, ...]
    matters: Callable[[Choice], bool] = _always
    """Whether it has an effect beside the values of the factors before it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The price of trying a choice, in any unit."""

    own: float = 1.0
    shared: float = 0.0
    """What is paid once for all choices with the same `shared_by`."""
    shared_by: Hashable = None


def choices(
    factors: Sequence[Factor], may_be: Callable[[Choice], bool], before: Choice | None = None
) -> Iterator[Choice]:
    """Every choice of values, each once, in the order of the factors and of their values. Pure.

    Args:
        may_be: whether a choice of the first factors, up to any of them, can be gone on with.
        before: values of other factors, to which each choice is added.
    """
    chosen = before or {}
    if not factors:
        yield chosen
        return
    first, *others = factors
    if not first.matters(chosen):
        yield from choices(others, may_be, chosen)
        return
    for value in first.values:
        longer = {**chosen, first.name: value}
        if may_be(longer):
            yield from choices(others, may_be, longer)


def pairs_of(choice: Choice) -> Iterator[Pair]:
    """Every two values of a choice. Pure."""
    return combinations(choice.items(), 2)


@dataclass(frozen=True, slots=True)
class _Candidate:
    choice: Choice
    pairs: int
    """A bit for each of its pairs."""
    cost: Cost


def covering_array(
    found: Iterable[Choice], cost: Callable[[Choice], Cost] = lambda _: Cost()
) -> list[Choice]:
    """Some of the choices, in which every pair occurs that occurs in all of them. Pure.

    Greedy: the next is the one with the most new pairs for its cost, the first of equals; a few
    full ones cost less in the end than many cheap ones, hence the power. Then those are left out,
    the most expensive first, whose pairs the others have.
    """
    bits: dict[Pair, int] = {}
    candidates = []
    for choice in found:
        pairs = 0
        for pair in pairs_of(choice):
            pairs |= 1 << bits.setdefault(pair, len(bits))
        candidates.append(_Candidate(choice, pairs, cost(choice)))
    missing, paid = (1 << len(bits)) - 1, set[Hashable]()
    taken: list[_Candidate] = []

    def worth(one: _Candidate) -> float:
        shared = 0.0 if one.cost.shared_by in paid else one.cost.shared
        return (one.pairs & missing).bit_count() ** 1.5 / (one.cost.own + shared)

    while missing:
        taken.append(max(candidates, key=worth))
        missing &= ~taken[-1].pairs
        paid.add(taken[-1].cost.shared_by)
    for one in sorted(taken, key=lambda one: -one.cost.own):
        rest = [other for other in taken if other is not one]
        if not one.pairs & ~_union(rest):
            taken = rest
    return [one.choice for one in taken]


def _union(candidates: Iterable[_Candidate]) -> int:
    union = 0
    for candidate in candidates:
        union |= candidate.pairs
    return union
