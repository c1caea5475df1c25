"""Hooks: points of a step at which a caller learns a rank's progress."""

from __future__ import annotations

from typing import Protocol

from holdfast.parallel.schedules import StepPhase


class AtPhase(Protocol):
    """A function that is called when a rank reaches a phase of a step; faults are injected here."""

    def __call__(self, step: int, phase: StepPhase, /) -> None:
        """Handle a phase; may be called in any thread.

        Args:
            step: counted from 1.
            phase: "fill" when state begins to be copied beside the step, "backward" when half of
                the backward passes have begun, "exchange" and "gather" when the first gradient sums
                and parameters of this rank are on their way, "prefetch" when parameters of later
                layers are, otherwise the phase that begins.
        """
        ...


def no_hook(step: int, phase: StepPhase, /) -> None:
    """Does nothing."""
