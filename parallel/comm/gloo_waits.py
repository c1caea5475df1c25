"""Interruptible waits on gloo's Work objects.

Measured on torch 2.13, and seen in gloo's source: when a connection is closed, gloo ends the waits
for messages that have not begun, but not the wait for one that was under way. That is a message of
which a part has come or left, whatever its size: a network carries it in several packets, and it
may follow others that fill the connection. It is also one that was to be written when the peer had
closed the connection. So every message is waited for in a thread of its own, for some 10 us. The
thread is abandoned when the connection is closed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from datetime import timedelta
from typing import Any


class InterruptibleWait:
    """One wait for one Work. One thread calls `wait`; any thread may call `cancel`."""

    def __init__(self, work: Any, timeout: timedelta) -> None:
        self.work = work
        self.timeout = timeout
        self._over = threading.Event()
        self._is_done = False
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Block until the work is done.

        Raises:
            RuntimeError: the work failed, or the wait was cancelled; the work may then stay under
                way for ever.
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

    def cancel(self) -> None:
        """Give up the wait, once nothing can write to the work's memory any more."""
        self._over.set()

    def run(self) -> None:
        """Wait for the work, in the thread taken for it."""
        try:
            self.work.wait(self.timeout)
            self._is_done = True
        except RuntimeError as error:
            self._error = error
        self._over.set()


class _WaitingThread:
    """A thread that waits for one work after another."""

    _idle: list[_WaitingThread] = []  # noqa: RUF012  (of the process)

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[InterruptibleWait] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="holdfast-wait", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls) -> _WaitingThread:
        with contextlib.suppress(IndexError):  # another thread may have taken the last
            while True:
                thread = cls._idle.pop()
                # A thread that was idle when this process was forked does not exist here.
                if thread._thread.is_alive():
                    return thread
        return cls()

    def give_back(self) -> None:
        self._idle.append(self)

    def _run(self) -> None:
        while True:
            self.asked.get().run()
