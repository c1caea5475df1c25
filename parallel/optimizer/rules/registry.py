"""The registry of optimizers by name. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.parallel.optimizer.rules.adamw import ADAMW
from holdfast.parallel.optimizer.rules.average import with_average
from holdfast.parallel.optimizer.rules.clip import with_clip
from holdfast.parallel.optimizer.rules.lion import LION
from holdfast.parallel.optimizer.rules.muon import MUON
from holdfast.parallel.optimizer.rules.rule import OptimizerRule
from holdfast.parallel.optimizer.rules.sgd import SGD

OPTIMIZERS: Mapping[str, OptimizerRule[Any]] = {
    rule.name: rule for rule in (ADAMW, MUON, LION, SGD)
}
"""The optimizers by the value of `optimizer.name`."""


def rule_of(section: Any) -> OptimizerRule[Any]:
    """The optimizer that an `[optimizer]` section names, with QK-clip and the average, of what is
    clipped, if it asks for them."""
    rule = OPTIMIZERS[section.name]
    rule = with_clip(rule) if section.qk_clip else rule
    return with_average(rule, section.ema) if section.ema else rule
