"""Learning-rate schedules: pure functions of the step number, and their registry.

A new one is a function and a line of `LEARNING_RATES`. May import nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

_DECAY_FRACTION = 0.2
"""The fraction of a "wsd" run, at its end, that decays if nothing else is said."""
_TIMESCALE = 10_000
"""The steps by which "inverse-sqrt" counts without a warm-up, as T5 has it (Raffel et al. 2020)."""


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


def linear(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    """Fall from `lr` to `min_lr`, reached at the last step, in a line."""
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return lr + (min_lr - lr) * min(1.0, progress)


def inverse_sqrt(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    """Fall with the square root of the step number, not below `min_lr` (Vaswani et al. 2017).

    The number of steps does not matter: a run may be made longer.
    """
    timescale = warmup_steps or _TIMESCALE
    return max(min_lr, lr * math.sqrt(timescale / (step + 1 + timescale - warmup_steps)))


LEARNING_RATES: Mapping[str, LearningRate] = {
    "cosine": cosine,
    "constant": constant,
    "wsd": constant,
    "linear": linear,
    "inverse-sqrt": inverse_sqrt,
}
"""The schedules by the value of `optimizer.schedule`. "wsd" (warm-up, stable, decay: Hu et al.
2024) is the constant one, with a decay at the end of every run."""

DECAY_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "1-sqrt": math.sqrt,
}
"""By the value of `optimizer.decay_shape`: the share of the fall that is done after a share of its
steps. "1-sqrt" is that of Hägele et al. 2024."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A schedule from a step on, up to the next stage or the end of the run."""

    start: int = 0
    """The first step, counted from 0: as many steps are done before."""
    schedule: str = "constant"
    """A name of `LEARNING_RATES`."""
    lr: float | None = None
    """The highest rate; None: that of the step before."""
    min_lr: float = 0.0
    warmup_steps: int = 0
    """The steps in which the rate goes to `lr`, from that of the step before."""
    decay_steps: int = 0
    """The last steps, in which the rate falls to `min_lr` from what the schedule has at the first
    of them; 0: a fifth of the stage with "wsd", else none."""
    decay_shape: str = "linear"
    """A name of `DECAY_SHAPES`."""

    def rate(self, step: int, steps: int, before: float) -> float:
        """The rate of one of its `steps`, counted from 0. Pure.

        Args:
            before: the rate of the step before the stage.
        """
        lr, warmup = before if self.lr is None else self.lr, self.warmup_steps
        if step < warmup:
            return before + (lr - before) * (step + 1) / warmup
        first = self.first_decay(steps)
        planned = LEARNING_RATES[self.schedule](
            max(first, warmup) if step >= first else step,
            steps=steps,
            lr=lr,
            min_lr=self.min_lr,
            warmup_steps=warmup,
        )
        if step < first:
            return planned
        progress = min(1.0, (step - first) / max(1, steps - 1 - first))
        return planned + (self.min_lr - planned) * DECAY_SHAPES[self.decay_shape](progress)

    def first_decay(self, steps: int) -> int:
        """The first of its `steps` that decays; the number of steps if none does. Pure."""
        by_default = max(1, round(steps * _DECAY_FRACTION)) if self.schedule == "wsd" else 0
        return max(0, steps - (self.decay_steps or by_default))


def learning_rate(step: int, *, steps: int, stages: Sequence[Stage]) -> float:
    """The rate used by the update of `step`, counted from 0. Pure; exact-mode safe (float64).

    Args:
        steps: of the whole run.
        stages: from the first, which starts at 0, in the order of their starts.
    """
    rate = 0.0
    ends = [*(stage.start for stage in stages[1:]), steps]
    for stage, end in zip(stages, (min(end, steps) for end in ends), strict=True):
        rate = stage.rate(min(step, end - 1) - stage.start, end - stage.start, rate)
        if step < end or end == steps:
            break
    return rate
