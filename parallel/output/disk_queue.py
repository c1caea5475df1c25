"""A queue of what is to be written: what the disk refuses waits in memory and is tried again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

LIMIT_BYTES = 16 << 20
"""The memory for what waits of one file; the oldest is dropped beyond it."""
AGAIN_S = 0.5
"""Seconds between attempts while the disk refuses."""
QUIET_S = 60.0
"""Seconds for which a disk that refuses again is not told again."""


class DiskWord:
    """The word to the user that files cannot be written: one line for all files of a process.

    It is told when the first file fails, and when the last one is written again. Shared between
    threads.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda _: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing has failed yet.

        Args:
            say: tells the user a line.
        """
        self.say, self._clock = say, clock
        self._failing: set[str] = set()
        self._told = False
        self._quiet_until_s: float | None = None

    def fails(self, name: str, error: OSError) -> None:
        """A file cannot be written; its contents wait in memory."""
        self._failing.add(name)
        now_s = self._clock()
        if self._told or (self._quiet_until_s is not None and now_s < self._quiet_until_s):
            return
        self._told, self._quiet_until_s = True, now_s + QUIET_S
        self.say(
            f"{name} cannot be written: {error.strerror}; the run goes on, its records are kept in "
            "memory and written when they can be"
        )

    def recovers(self, name: str, dropped: int) -> None:
        """A file has all that waited, but for the records that were dropped."""
        self._failing.discard(name)
        if dropped:
            self.say(f"{name} lacks {dropped} records, for which there was no memory")
        if self._told and not self._failing:
            self._told = False
            self.say("the records that had to wait are written")

    def loses(self, name: str, count: int, error: OSError | None) -> None:
        """The process ends, and a file lacks the last records."""
        self._failing.discard(name)
        reason = f": {error.strerror}" if error is not None else ""
        self.say(f"{name} lacks the last {count} records, which could not be written{reason}")


class DiskQueue(Generic[T]):
    """What waits for one file or folder, in order. No call raises OSError; used in any thread.

    It has many attributes because one lock guards all that a retry needs.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[T]], tuple[int, OSError | None]],
        size_of: Callable[[T], int],
        word: DiskWord,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """Nothing waits.

        Args:
            name: the file, for messages.
            write: writes records in order. Returns how many are written whole, and the error that
                stopped it.
            size_of: the bytes of memory of a record.
            limit_bytes: the memory for what waits.
        """
        self._name, self._write, self._size_of, self._word = name, write, size_of, word
        self._clock, self._sleep, self._limit_bytes = clock, sleep, limit_bytes
        self._lock = threading.RLock()
        self._waiting: deque[T] = deque()
        self._bytes = self._dropped = 0
        self._error: OSError | None = None
        self._again_s = 0.0
        self._writing = False

    @property
    def waits(self) -> bool:
        """Whether something waits."""
        return bool(self._waiting)

    def put(self, record: T) -> None:
        """Write a record, or keep it until the disk takes it."""
        with self._lock:
            self._waiting.append(record)
            self._bytes += self._size_of(record)
            while self._bytes > self._limit_bytes and len(self._waiting) > 1 and not self._writing:
                self._bytes -= self._size_of(self._waiting.popleft())
                self._dropped += 1
            if self._error is None or self._clock() >= self._again_s:
                self._attempt()

    def flush(self, patience_s: float = 0.0) -> bool:
        """Write what waits, with attempts for this time. Returns whether nothing waits any more."""
        end_s = self._clock() + patience_s
        while True:
            with self._lock:
                self._attempt()
                if not self._waiting:
                    return True
            if self._clock() >= end_s:
                return False
            self._sleep(AGAIN_S)

    def forget(self) -> None:
        """Forget what waits."""
        with self._lock:
            self._waiting.clear()
            self._bytes = self._dropped = 0

    def close(self, patience_s: float) -> None:
        """Write what waits, and tell what is lost."""
        if not self.flush(patience_s):
            with self._lock:
                self._word.loses(self._name, len(self._waiting) + self._dropped, self._error)
                self.forget()

    def _attempt(self) -> None:
        """Write what waits. A call within a call, by a signal's handler, leaves it to the first."""
        if self._writing or not self._waiting:
            return
        self._writing = True
        try:
            written, error = self._write(tuple(self._waiting))
        finally:
            self._writing = False
        for _ in range(written):
            self._bytes -= self._size_of(self._waiting.popleft())
        before, self._error = self._error, error
        if error is not None:
            self._again_s = self._clock() + AGAIN_S
            self._word.fails(self._name, error)
        elif before is not None:
            dropped, self._dropped = self._dropped, 0
            self._word.recovers(self._name, dropped)
