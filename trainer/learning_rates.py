"""Learning-rate schedules: pure functions of the step number, and their registry.

A new one is a function and a line of `LEARNING_RATES`. May import nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

_DECAY_FRACTION = 0.2
"""The fraction of a "wsd" run, at its end, that decays."""


class LearningRate(Protocol):
    """A schedule after its warm-up."""

    def __call__(
        self, step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int
    ) -> float:
        """The rate of `step`, counted from 0 and at least `warmup_steps`. Pure."""
        ...


def cosine(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    """Fall from `lr` to `min_lr`, reached at the last step, by half a cosine."""
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def constant(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    """Stay at `lr`."""
    return lr


def warmup_stable_decay(
    step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int
) -> float:
    """Stay at `lr`, then fall linearly to `min_lr` over the last fifth (Hu et al. 2024)."""
    first_decay = steps - max(1, round(steps * _DECAY_FRACTION))
    if step < first_decay:
        return lr
    progress = (step - first_decay) / max(1, steps - 1 - first_decay)
    return lr + (min_lr - lr) * min(1.0, progress)


LEARNING_RATES: Mapping[str, LearningRate] = {
    "cosine": cosine,
    "constant": constant,
    "wsd": warmup_stable_decay,
}
"""The schedules by the value of `optimizer.schedule`."""


def learning_rate(
    step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int, schedule: str
) -> float:
    """The rate used by the update of `step`, counted from 0. Pure; exact-mode safe (float64).

    Warm-up is linear and reaches `lr` at step `warmup_steps - 1`; then the schedule holds.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    rate = LEARNING_RATES[schedule]
    return rate(step, steps=steps, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps)
