"""Points of a step at which a caller is told how far a rank is."""

from __future__ import annotations

from typing import Protocol

from holdfast.parallel.step_phases import StepPhase


class AtPhase(Protocol):
    """Called when a rank reaches a phase of a step: the place where faults are injected."""

    def __call__(self, step: int, phase: StepPhase, /) -> None:
        """May be called in any thread.

        Args:
            step: counted from 1.
            phase: "fill" when state begins to be copied beside the step, "backward" when half of
                the backward passes have begun, else the phase that begins.
        """
        ...


def no_hook(step: int, phase: StepPhase, /) -> None:
    """Does nothing."""
