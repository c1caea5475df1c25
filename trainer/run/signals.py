"""The signals by which a person or a scheduler asks a rank to save or to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from holdfast.parallel.errors import Interrupted
from holdfast.parallel.output import Interrupts


def begin_to_hear() -> None:
    """Pass over SIGUSR1 until a rank listens: before its first step there is nothing to save.

    Otherwise it would end the process. The main thread calls it; children inherit it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Signals:
    """Signals that ask for something at the end of a step.

    SIGUSR1 asks for a save; SIGTERM, and SIGINT of a person, for a save and the end.
    """

    def __init__(self) -> None:
        self.save = False
        self.stop = False
        self.interrupt = False
        self._interrupts = Interrupts()
        self._before: dict[int, Any] = {}

    def listen(self, interrupted: Callable[[], None] | None = None, *, alone: bool = False) -> None:
        """Install the handlers; only the main thread of a process can.

        Args:
            interrupted: called in the handler of the first SIGINT.
            alone: whether a second SIGINT ends this process at once; otherwise the process that
                started it does.
        """

        def asked(number: int, _: FrameType | None) -> None:
            self.save = True
            self.stop = self.stop or number != signal.SIGUSR1
            if number != signal.SIGINT:
                return
            is_second, told = self._interrupts.is_second(), self.interrupt
            self.interrupt = True
            if alone and is_second:
                os._exit(Interrupted.exit_code)
            if interrupted is not None and not told:
                interrupted()

        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, asked)

    def close(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
