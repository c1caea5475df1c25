"""The calls that signals and other threads queue for a main thread that waits in a selector."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

_T = TypeVar("_T")


class MainThreadQueue:
    """Calls that run in the main thread, in the order in which signals and threads queued them."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._previous: dict[int, object] = {}

    def fileno(self) -> int:
        """The descriptor of a socket that is readable while calls are queued."""
        return self._reader.fileno()

    def on_signals(self, numbers: tuple[signal.Signals, ...], call: Callable[[int], None]) -> None:
        """Queue `call(number)` for each of these signals, in place of their handlers."""

        def note(number: int, _: FrameType | None) -> None:
            self._calls.put(lambda: call(number))
            self._wake()

        for number in numbers:
            self._previous[number] = signal.signal(number, note)

    def forwarding(self, call: Callable[[_T], None]) -> Callable[[_T], None]:
        """A function for another thread: it queues `call` with its argument for the main thread."""

        def receive(value: _T) -> None:
            self._calls.put(lambda: call(value))
            self._wake()

        return receive

    def run_calls(self) -> None:
        """Make all queued calls. Main thread only."""
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
