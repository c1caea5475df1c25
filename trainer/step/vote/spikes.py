"""The loss-spike guard: whether a step stands out from the last ones, and is left out for that.

The rule is that of OLMo-core's skip-step optimizers: a step is a spike where its loss or its
gradient norm is above the mean of the last steps by more than some standard deviations. It is not
asked before half of the window is known. Spikes are remembered like other steps, so that the guard
follows a run that has come to another level. Everything here is pure, and made of operations that
are rounded correctly: equal numbers give the same decision on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from holdfast.trainer.config import NumericsConfig
from holdfast.trainer.step.vote.progress import Outcome, RecentSteps

_FEWEST_STEPS = 2
"""Fewer have no standard deviation."""


def judged(outcome: Outcome, recent: RecentSteps, numerics: NumericsConfig) -> Outcome:
    """The outcome with what makes it a spike, if it is one.

    Args:
        recent: the steps before.
    """
    window, sigmas = numerics.spike_window, numerics.spike_sigmas
    if not window or not outcome.usable:
        return outcome
    found = (
        ("loss", outcome.loss, recent.losses[-window:]),
        ("gradient norm", outcome.grad_norm, recent.grad_norms[-window:]),
    )
    for name, value, before in found:
        if len(before) < max(_FEWEST_STEPS, window // 2):
            continue
        mean, deviation = mean_and_deviation(before)
        if value - mean > sigmas * deviation:
            spike = (
                f"its {name} of {value:.6g} is more than {sigmas:g} standard deviations of "
                f"{deviation:.3g} above {mean:.6g}, the mean of the {len(before)} steps before"
            )
            return replace(outcome, spike=spike)
    return outcome


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two numbers, and the standard deviation of their population's estimate.

    Sums are exact before they are rounded, so that no order matters.
    """
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) * (value - mean) for value in values)
    return mean, math.sqrt(squares / (len(values) - 1))
