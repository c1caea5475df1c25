"""The signals by which a person or a scheduler asks a rank to save or to end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


def begin_to_hear() -> None:
    """Pass over SIGUSR1 until a rank listens: before its first step there is nothing to save.

    Otherwise it would end the process. The main thread calls it; children inherit it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Signals:
    """Signals: SIGUSR1 asks for a save, SIGTERM for a save and the end, at the end of a step."""

    def __init__(self) -> None:
        self.save = False
        self.stop = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the handlers; only the main thread of a process can."""

        def asked(number: int, _: FrameType | None) -> None:
            if number == signal.SIGTERM:
                self.stop = True
            self.save = True

        for number in (signal.SIGUSR1, signal.SIGTERM):
            self._before[number] = signal.signal(number, asked)

    def close(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
