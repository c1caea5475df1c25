"""A wait at the start of a run: it has a limit, and after 5 s it says what it is for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from holdfast.parallel.output import tell

TELL_AFTER_S = 5.0
"""Seconds after which a wait is told."""


def tell_person(line: str) -> None:
    """Write one line to standard error; output that cannot be written is left out."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        tell(f"holdfast: {line}")


class Waiting:
    """One wait for something that others must do. It is told once."""

    def __init__(
        self,
        what: str,
        limit_s: float,
        *,
        tell: Callable[[str], None] = tell_person,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin the wait.

        Args:
            what: what is waited for, and where: `the first task at HOST:PORT`.
            limit_s: seconds after which it is given up.
        """
        self._what, self._limit_s, self._tell, self._clock = what, limit_s, tell, clock
        self._began_s = clock()
        self._told = False

    def left_s(self, reason: str = "") -> float:
        """Seconds that are left; 0 or less: it is time to give up. Tells of the wait when due.

        Args:
            reason: why it has not come yet, if that is known.
        """
        waited_s = self._clock() - self._began_s
        if waited_s >= TELL_AFTER_S:
            self._tell_once(reason)
        return self._limit_s - waited_s

    @contextlib.contextmanager
    def in_a_call(self) -> Iterator[None]:
        """Tell of the wait from a thread during the block, which is one call that blocks."""
        timer = threading.Timer(TELL_AFTER_S, self._tell_once)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _tell_once(self, reason: str = "") -> None:
        if not self._told:
            self._told = True
            why = f" ({reason})" if reason else ""
            self._tell(
                f"waiting for {self._what} since {TELL_AFTER_S:g} s{why}; "
                f"given up after {self._limit_s:g} s"
            )
