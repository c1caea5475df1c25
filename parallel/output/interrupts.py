"""Interrupts (SIGINT) as a person means them."""

from __future__ import annotations

import time
from collections.abc import Callable

SAVING = "saving after this step; press Ctrl-C again to end at once"
"""The answer to the first interrupt of a run."""
_MOMENT_S = 1.0


class Interrupts:
    """Interrupts of a process: those of a moment are one, which has come in two ways.

    A terminal sends it to a launcher and its workers, and the launcher to its workers once more.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """None has come."""
        self._clock = clock
        self._first_s: float | None = None

    @property
    def came(self) -> bool:
        """Whether one has come."""
        return self._first_s is not None

    def is_second(self) -> bool:
        """Whether the one that comes now is not the first."""
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
        return now_s - self._first_s > _MOMENT_S
