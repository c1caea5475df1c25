"""Interruptible waits on gloo's Work objects.

Measured on torch 2.13, and seen in gloo's source: when a connection is closed, gloo ends the waits
for messages that have not begun, but not the wait for one that was under way. That is a message of
which a part has come or left, whatever its size: a network carries it in several packets, and it
may follow others that fill the connection. It is also one that was to be written when the peer had
closed the connection. So messages are waited for in a thread of their own, all of a collective in
one, since each change of threads takes 10 us, and 100 us on busy cores. The thread is abandoned
when a connection is closed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any


class InterruptibleWait:
    """A wait for some Works, in turn. One thread calls `wait`; any thread may call `cancel`."""

    def __init__(
        self,
        works: Sequence[Any],
        timeout: timedelta,
        begins: Callable[[int], object],
        ends: Callable[[int], object],
    ) -> None:
        """Nothing is waited for yet.

        Args:
            timeout: of each work.
            begins, ends: called, in another thread, with the position of each work before it is
                waited for, and once it is done.
        """
        self._works, self._timeout = works, timeout
        self._begins, self._ends = begins, ends
        self._over = threading.Event()
        self._error: BaseException | None = None
        self.done = 0
        """The works that are done."""

    def wait(self) -> None:
        """Block until all works are done.

        Raises:
            RuntimeError: the work after those that are done has failed, or the wait was cancelled;
                works may then stay under way for ever.
        """
        thread = _WaitingThread.take()
        thread.asked.put(self)
        self._over.wait()
        if self._error is None and self.done < len(self._works):
            raise RuntimeError("the connection has ended")
        thread.give_back()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Give up the wait, once nothing can write to the memory of one of the works any more."""
        self._over.set()

    def run(self) -> None:
        """Wait for the works, in the thread taken for them."""
        try:
            for place, work in enumerate(self._works):
                self._begins(place)
                work.wait(self._timeout)
                if self._over.is_set():
                    return
                self._ends(place)
                self.done = place + 1
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
