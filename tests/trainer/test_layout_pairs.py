"""Every two values that go together, in a run with the bits of one process.

The factors: tensor and context degree (1, 2, 4), stages and replicas (1, 2, 4), chunks per rank
(1, 2), every schedule, either exchange of a context group, sequence parallelism, stretches (1, 2),
what replicas share and what is recomputed; and the constants that fix bits: precision, packing,
with which goes the optimizer, tensor shards and slices (1, 4). A value counts where it has an
effect: chunks, say, beside stages only. Each legal layout of up to eight ranks could be taken; a
covering array has about fifty, in which every legal pair of values occurs. Losses and norms of all
steps and the parameters at the end are compared with those of one process that has the same
constants; without tensor shards, where the tensor degree is such a constant, with those of one
tensor group. tests/trainer/test_layout_soak.py takes all layouts.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest

from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.rules import problems_of
from support.processes.cluster import Cluster
from support.runs.covering import Choice, Factor, choices, covering_array, pairs_of
from support.runs.layout_factors import (
    FREE,
    PARTS,
    POWERS,
    POWERS_OF_TWO,
    config_of,
    cost_of,
    fits,
    is_legal,
    legal,
    ranks_of,
)
from support.runs.undisturbed import Undisturbed


def run_of(choice: Choice) -> RunConfig:
    """The run of a choice. Its second step begins with weights, moments and averages that others
    have changed; tensor groups of four, which take longest, have one step: those of two have both.
    """
    return config_of(choice, steps=1 if choice["tensor"] == max(POWERS) else 2)


@pytest.fixture(scope="module")
def found() -> list[Choice]:
    """Every legal choice."""
    return list(legal(POWERS_OF_TWO))


@pytest.fixture(scope="module")
def array(found: list[Choice]) -> list[Choice]:
    """The choices that are tried."""
    return covering_array(found, cost_of)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What undisturbed runs give, each once."""
    return Undisturbed(cluster)


def in_all_orders(factors: tuple[Factor, ...]) -> list[Choice]:
    """Every choice, by trying all values of all factors."""
    seen: dict[tuple[object, ...], Choice] = {}
    for values in product(*(factor.values for factor in factors)):
        choice: dict[str, str | int | bool] = {}
        for factor, value in zip(factors, values, strict=True):
            if factor.matters(choice):
                choice[factor.name] = value
        seen[tuple(choice.items())] = choice
    return list(seen.values())


def test_all_choices_are_found_each_once() -> None:
    """By rules that look at a whole choice; `choices` leaves beginnings out that cannot be."""
    expected = [choice for choice in in_all_orders(POWERS_OF_TWO) if fits(choice)]
    assert list(choices(POWERS_OF_TWO, fits)) == expected


def test_every_two_values_occur_in_the_array_or_in_no_legal_layout(
    found: list[Choice], array: list[Choice]
) -> None:
    all_values = [(f.name, value) for f in (*POWERS_OF_TWO, *FREE) for value in f.values]
    legal_pairs = {pair for choice in found for pair in pairs_of(choice)}
    taken = {frozenset(pair) for choice in array for pair in pairs_of(choice)}
    for pair in combinations(all_values, 2):
        if pair[0][0] != pair[1][0]:
            assert (pair in legal_pairs) == (frozenset(pair) in taken), pair
    assert all(choice in found for choice in array)
    assert max(map(ranks_of, array)) == 8
    assert {value for pair in legal_pairs for value in pair} == set(all_values)
    assert covering_array(found, cost_of) == array


def test_rules_ask_for_no_free_factor(found: list[Choice], array: list[Choice]) -> None:
    for choice in array:
        assert problems_of(run_of(choice)) == []
    free = {factor.name for factor in FREE}
    allowed = {tuple(item for item in choice.items() if item[0] not in free) for choice in found}
    illegal = [one for one in choices(POWERS_OF_TWO, fits) if tuple(one.items()) not in allowed]
    assert illegal
    for number, choice in enumerate(illegal):
        others = list(choices(FREE, fits, choice))
        assert not is_legal(others[number % len(others)]), choice


def test_a_covering_array_has_what_rules_allow_and_little_more() -> None:
    factors = [Factor(name, (0, 1, 2)) for name in "abcd"]
    factors.append(Factor("e", (True, False), lambda chosen: chosen["a"] != 0))

    def may_be(choice: Choice) -> bool:
        return (choice.get("a"), choice.get("b")) != (1, 2)

    found = list(choices(factors, may_be))
    array = covering_array(found)
    pairs = {pair for choice in found for pair in pairs_of(choice)}
    assert {pair for choice in array for pair in pairs_of(choice)} == pairs
    assert (("a", 1), ("b", 2)) not in pairs
    assert (("a", 0), ("e", True)) not in pairs
    assert 9 <= len(array) <= 14


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shards", [1, PARTS])
def test_layouts_give_the_bits_of_one_process(
    undisturbed: Undisturbed, array: list[Choice], precision: str, shards: int
) -> None:
    """In several cases, so that each ends soon."""
    wanted = {"precision": precision, "tensor_shards": shards}
    tried = [one for one in array if wanted.items() <= one.items()]
    differ = [one for one in tried if not undisturbed.has_bits_of(run_of(one))]
    assert tried
    assert differ == []
