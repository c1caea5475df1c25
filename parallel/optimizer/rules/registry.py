"""The registry of optimizers by name. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.parallel.optimizer.rules.adamw import ADAMW
from holdfast.parallel.optimizer.rules.lion import LION
from holdfast.parallel.optimizer.rules.muon import MUON
from holdfast.parallel.optimizer.rules.rule import OptimizerRule
from holdfast.parallel.optimizer.rules.sgd import SGD

OPTIMIZERS: Mapping[str, OptimizerRule[Any]] = {
    rule.name: rule for rule in (ADAMW, MUON, LION, SGD)
}
"""The optimizers by the value of `optimizer.name`."""
