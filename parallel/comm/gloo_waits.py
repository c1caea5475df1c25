"""Waits for gloo's works that another thread can end.

Measured on torch 2.13, and seen in gloo's source: when a connection ends, gloo frees those who wait for messages that
have not begun, and nobody who waits for one that was cut off in the middle. So what may travel in parts is waited
for in a thread beside, which is left to itself when the connection has ended.
"""

from __future__ import annotations

import queue
import threading
from datetime import timedelta
from typing import Any

WHOLE_BYTES = 1 << 14
"""Messages up to here are taken to arrive whole or not at all: waiting beside costs some 50 us."""


class InterruptibleWait:
    """One wait for one work. The caller that needs the work calls `wait`; any thread may call `free`."""

    def __init__(self, work: Any, timeout: timedelta) -> None:
        self.work = work
        self.timeout = timeout
        self._over = threading.Event()
        self._is_done = False
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Raises:
        RuntimeError: the work failed, or the wait was ended: then the work may stay under way for good.
        """
        thread = _WaitingThread.take()
        thread.asked.put(self)
        self._over.wait()
        if self._error is not None:
            thread.give_back()
            raise self._error
        if not self._is_done:
            raise RuntimeError("the connection has ended")
        thread.give_back()

    def free(self) -> None:
        """End the wait. Nothing may write to the work's memory any more."""
        self._over.set()

    def run(self) -> None:
        """Wait for the work, in the thread that was taken for it."""
        try:
            self.work.wait(self.timeout)
            self._is_done = True
        except RuntimeError as error:
            self._error = error
        self._over.set()


class _WaitingThread:
    """A thread that waits for one work after another; one wait at a time takes it."""

    _idle: list[_WaitingThread] = []  # noqa: RUF012  (of the process)

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[InterruptibleWait] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="holdfast-wait", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls) -> _WaitingThread:
        while cls._idle:
            thread = cls._idle.pop()
            if (
                thread._thread.is_alive()
            ):  # else it was idle in the process that this one was forked from
                return thread
        return cls()

    def give_back(self) -> None:
        self._idle.append(self)

    def _run(self) -> None:
        while True:
            self.asked.get().run()
