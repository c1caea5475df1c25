"""Times of a step's forward and backward passes, and of the drive's transfers within them."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Literal

Phase = Literal["forward", "backward"]


class Phases:
    """Times by phase, from the moments at which tensors are saved and needed. Local."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self.restart(0.0)

    def restart(self, busy_s: float) -> None:
        """Begin a step. `busy_s`: seconds of transfers since the store was opened."""
        self.seconds: dict[Phase, float] = {"forward": 0.0, "backward": 0.0}
        self.busy_s: dict[Phase, float] = {"forward": 0.0, "backward": 0.0}
        self._phase: Phase = "forward"
        self._last_s = self._clock()
        self._busy_before_s = busy_s

    def at(self, phase: Phase, busy_s: Callable[[], float]) -> None:
        """Note that `phase` is under way; the time since the last note counts for `phase`."""
        now = self._clock()
        self.seconds[self._phase] += now - self._last_s
        self._last_s = now
        if phase != self._phase:
            self._count_busy(busy_s())
            self._phase = phase

    def finish(self, busy_s: float) -> None:
        """End the step."""
        self.seconds[self._phase] += self._clock() - self._last_s
        self._count_busy(busy_s)

    def _count_busy(self, busy_s: float) -> None:
        self.busy_s[self._phase] += busy_s - self._busy_before_s
        self._busy_before_s = busy_s
