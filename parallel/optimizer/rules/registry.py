"""The registry of optimizers by name. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.parallel.optimizer.rules.adamw import ADAMW
from holdfast.parallel.optimizer.rules.rule import OptimizerRule

OPTIMIZERS: Mapping[str, OptimizerRule[Any]] = {rule.name: rule for rule in (ADAMW,)}
"""The optimizers by the value of `optimizer.name`."""
