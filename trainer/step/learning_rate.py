"""The learning rate of a step of a run."""

from __future__ import annotations

from holdfast.trainer.config import RunConfig
from holdfast.trainer.learning_rates import learning_rate


def rate_of(config: RunConfig, step: int) -> float:
    """The learning rate of a step, counted from 0, of this run. Pure."""
    return learning_rate(step, steps=config.train.steps, stages=config.optimizer.all_stages)
