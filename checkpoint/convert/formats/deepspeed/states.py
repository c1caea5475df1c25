"""DeepSpeed's names of the states of parameters and flat partitions. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from holdfast.checkpoint.convert.rules import RuleBook, StateRule
from holdfast.checkpoint.convert.sources import StoredTensor
from holdfast.checkpoint.format import STEP
from holdfast.parallel.optimizer import MASTER

FP32, COUNT = "fp32", "step"
KINDS = {FP32: MASTER, COUNT: STEP}
"""The kinds by DeepSpeed's names; every other state has the name of its kind."""


def with_states(book: RuleBook, kinds: Iterable[str]) -> RuleBook:
    """The rules, and a state `KIND/{key}` for each of these kinds."""
    states = tuple(StateRule(f"{kind}/{{key}}", kind) for kind in kinds)
    return msgspec.structs.replace(book, states=book.states + states)


def partitions(
    kept: Mapping[str, Any], elements: int, left_out: dict[str, str]
) -> dict[str, StoredTensor]:
    """The states of a flat partition, by kind.

    Args:
        kept: the values that torch's optimizer keeps of the partition, by name.
        elements: the partition's size; padding may follow in a state.
        left_out: a mapping that gets every other value, with the reason.
    """
    found: dict[str, StoredTensor] = {}
    for name, value in kept.items():
        if name == COUNT or value is None:
            continue
        shape = value.shape if isinstance(value, StoredTensor) else ()
        if name not in KINDS and len(shape) == 1 and shape[0] >= elements:
            found[name] = value
        else:
            left_out[f"optimizer state {name}"] = "not a value for each element of parameters"
    return found
