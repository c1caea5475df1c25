"""The learning rate of a step: a pure function of the configuration and the step number."""

from __future__ import annotations

import math
from typing import Literal

from holdfast.trainer.config import RunConfig

_DECAY_FRACTION = 0.2
"""The last part of a "wsd" run (Hu et al. 2024, warm-up, stable, decay) that decays."""


def learning_rate(
    step: int,
    *,
    steps: int,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    schedule: Literal["cosine", "constant", "wsd"],
) -> float:
    """The rate used by the update of `step`, counted from 0.

    Warm-up is linear and reaches `lr` at step `warmup_steps - 1`; "cosine" then falls to `min_lr` at the
    last step, "wsd" falls linearly over the last fifth of the run. Local; exact-mode safe (float64).
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    last = steps - 1
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, last - warmup_steps)
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    first_decay = steps - max(1, round(steps * _DECAY_FRACTION))
    if step < first_decay:
        return lr
    progress = (step - first_decay) / max(1, last - first_decay)
    return lr + (min_lr - lr) * min(1.0, progress)


def rate_of(config: RunConfig, step: int) -> float:
    """The learning rate of a step of this run, counted from 0."""
    optimizer = config.optimizer
    return learning_rate(
        step,
        steps=config.train.steps,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_steps=optimizer.warmup_steps,
        schedule=optimizer.schedule,
    )
