"""How signals and other threads reach a main thread that waits in a selector."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

_T = TypeVar("_T")


class Mailbox:
    """Calls to be made in the main thread, in the order in which signals and threads left them."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._previous: dict[int, object] = {}

    def fileno(self) -> int:
        """Readable when there is a call to be made."""
        return self._reader.fileno()

    def on_signals(self, numbers: tuple[signal.Signals, ...], call: Callable[[int], None]) -> None:
        """Have `call` called in the main thread's loop, not in the handler, for these signals."""

        def note(number: int, _: FrameType | None) -> None:
            self._calls.put(lambda: call(number))
            self._wake()

        for number in numbers:
            self._previous[number] = signal.signal(number, note)

    def deliver_to(self, call: Callable[[_T], None]) -> Callable[[_T], None]:
        """What another thread calls to have `call` called in the main thread."""

        def receive(value: _T) -> None:
            self._calls.put(lambda: call(value))
            self._wake()

        return receive

    def empty(self) -> None:
        """Make all calls that have been left."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass
        while not self._calls.empty():
            self._calls.get()()

    def close(self) -> None:
        """Put back the signals' handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._reader.close()
        self._writer.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")
