"""The lines that workers have for the user."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.parallel.output import tell_person

_AGAIN_S = 60.0
"""Seconds for which an equal line is not shown again."""


class WorkerLines:
    """The lines that the workers of a node have the user told; what several say is shown once."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        """Nothing has been shown."""
        self._clock = clock
        self._again_s: dict[str, float] = {}
        """By the lines shown lately, the time from which each is shown again."""

    def show(self, line: str) -> None:
        """Print a line for the user, unless it was shown lately."""
        now_s = self._clock()
        if now_s >= self._again_s.get(line, now_s):
            self._again_s = {text: s for text, s in self._again_s.items() if s > now_s}
            self._again_s[line] = now_s + _AGAIN_S
            tell_person(line)
