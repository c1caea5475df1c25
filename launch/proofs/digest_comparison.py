"""The comparison of two runs by their digests: the first step that differs, and in what. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.trainer.reports import StepDigests

Kind = Literal["start", "update", "gradients"]
"""What differs first: the parameters before the first step that both have, the update of a step, or
the loss or gradients of a step whose parameters are the same before it."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where the digests of two runs part."""

    step: int
    """Counted from 1: the step that differs; of a start, the first that both have."""
    kind: Kind
    layers: tuple[int, ...]
    """Those whose sums differ; empty: the loss alone does."""
    equal_until: int
    """The last step with the same digests before it; 0: there is none."""

    @property
    def is_exact(self) -> bool:
        """Whether it is known to be this step, and not one since `equal_until`."""
        return self.kind != "update" or self.step == max(1, self.equal_until)


def common_steps(first: Mapping[int, StepDigests], second: Mapping[int, StepDigests]) -> list[int]:
    """The steps of which both have digests, in order."""
    return sorted(first.keys() & second.keys())


def divergence(
    first: Mapping[int, StepDigests], second: Mapping[int, StepDigests]
) -> Divergence | None:
    """The first difference in the steps of which both have digests; None: these are the same."""
    equal_until = 0
    for step in common_steps(first, second):
        a, b = first[step], second[step]
        if a == b:
            equal_until = step
            continue
        if moved := _differing(a.parameters, b.parameters):
            if not equal_until:
                return Divergence(step, "start", moved, 0)
            return Divergence(step - 1, "update", moved, equal_until)
        return Divergence(step, "gradients", _differing(a.gradients, b.gradients), equal_until)
    return None


def _differing(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    if len(first) != len(second):
        return tuple(range(max(len(first), len(second))))
    return tuple(n for n, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
