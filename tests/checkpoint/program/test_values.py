"""Values go to JSON and come back as they were, in type and bits, or are refused by path."""

from __future__ import annotations

import collections
import enum
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from holdfast.checkpoint.program.values import TAG, decode, encode
from holdfast.parallel.errors import CheckpointError
from support.oracles.exact_form import form_of

WORDS = st.text(st.characters(exclude_categories=[]), max_size=4)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.complex_numbers(),
    WORDS,
    st.binary(max_size=4),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([2, 3]), np.float64("nan")]),
    st.floats().map(np.float64),
    st.floats(width=32).map(np.float32),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
)
KEYS = st.one_of(WORDS, st.integers(), st.booleans(), st.none(), st.just(TAG))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda items: collections.deque(items, 5)),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
        st.dictionaries(KEYS, inner, max_size=3).map(lambda d: collections.defaultdict(list, d)),
        st.frozensets(st.integers(), max_size=3),
        st.sets(WORDS, max_size=3),
    ),
    max_leaves=8,
)


def no_tensor(value: Tensor, path: str) -> dict[str, Any]:
    raise AssertionError(path)


def through_json(
    value: Any, keep: Callable[[Tensor, str], dict[str, Any]] = no_tensor, make: Any = None
) -> Any:
    """What comes back of a value that went through the text of a manifest."""
    text = msgspec.json.encode(encode(value, "value", keep))
    later: list[Callable[[], object]] = []
    found = decode(msgspec.json.decode(text), None, "value", make, later.append)
    for act in later:
        act()
    return found


@given(VALUES)
def test_every_value_comes_back_in_type_and_bits(value: Any) -> None:
    assert form_of(through_json(value)) == form_of(value)


def test_what_json_has_stands_in_it_as_it_is() -> None:
    plain = {"lr": 0.1, "steps": 1 << 60, "name": "ü", "on": True, "none": None, "list": [1, [2.5]]}
    assert encode(plain, "plain", no_tensor) == plain


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint16).reshape(2, 3)[:, ::-1],
        np.array(2.5),
        np.array(["a", "bcd"]),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.arange(3, dtype=">i4"),
        np.zeros((0, 3), np.complex128),
        np.array([math.nan, -0.0], np.longdouble),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_every_type_come_back(array: Any) -> None:
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, path: str) -> dict[str, Any]:
        kept[path] = value
        return {TAG: "tensor", "name": path}

    found = through_json(array, keep, lambda doc, old, path: kept[doc["name"]].clone())
    assert form_of(found) == form_of(np.array(array, order="C"))


def test_a_generator_goes_on_where_it_was() -> None:
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, path: str) -> dict[str, Any]:
        kept[path] = value
        return {TAG: "tensor", "name": path}

    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    again = through_json(generator, keep, lambda doc, old, path: kept[doc["name"]].clone())
    assert torch.equal(torch.rand(4, generator=again), torch.rand(4, generator=generator))


class Colour(enum.IntEnum):
    RED = 1


class Named(collections.namedtuple("Named", "a")):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Colour.RED, "Colour"),
        (Named(1), "Named"),
        (Path("x"), "Path"),
        (lambda: 0, "function"),
        (collections.defaultdict(lambda: 0), "default factory"),
        (np.array([object()]), "numpy value of type object"),
        (torch.nn.Linear(1, 1), "a key of its own"),
        ({torch.zeros(1): 1}, "a tensor is a key"),
    ],
)
def test_what_would_come_back_as_another_type_is_refused_by_its_path(
    value: Any, named: str
) -> None:
    with pytest.raises(CheckpointError, match=r"s\['deep'\]\[1\].* cannot be saved") as error:
        encode({"deep": [0, value]}, "s", no_tensor)
    assert named in str(error.value)


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"k": (v,)}, lambda v: [[], [v]]])
def test_a_value_that_contains_itself_is_refused(wrap: Callable[[Any], Any]) -> None:
    value: list[Any] = []
    value.append(wrap(value))
    with pytest.raises(CheckpointError, match="contains itself"):
        encode(value, "s", no_tensor)


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {1: v}, lambda v: (v, v)])
def test_a_value_of_too_many_levels_is_not_said_to_contain_itself(
    wrap: Callable[[Any], Any],
) -> None:
    value: Any = 1
    for _ in range(2000):
        value = wrap(value)
    with pytest.raises(CheckpointError, match="s cannot be saved: it is nested too deeply"):
        encode(value, "s", no_tensor)
