"""A file that is only added to, in whole records, by any number of processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path

from holdfast.parallel.files import open_added
from holdfast.parallel.output.disk_queue import LIMIT_BYTES, DiskQueue, DiskWord

_LOCK_TRIES = 50
_LOCK_PAUSE_S = 0.001
_LONGEST_TAIL = 1 << 20
_PATIENCE_S = 1.0
"""Seconds that the end of a process waits for a disk that refuses."""


class Tail(Enum):
    """The treatment of an unfinished line at the end of a file, which a dead process left."""

    SET_ASIDE = "moved to the file of foreign lines"
    ENDED = "ended by a line feed"
    KEPT = "kept, as records are not lines"


class AppendedFile:
    """A file of whole records. No method raises OSError; used in any thread.

    A record is written whole or not at all. What the disk refuses waits in memory and follows
    before later records; see `DiskQueue`. The file is opened at the first record; its folder must
    exist, so that the folder of a run that was moved away is not made again.
    """

    def __init__(
        self,
        path: Path,
        word: DiskWord,
        tail: Tail,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """Nothing is opened yet; see `DiskQueue` for the arguments."""
        self._path, self._tail = path, tail
        self._descriptor = self._opened_by = -1
        self._queue = DiskQueue(
            str(path), self._write, len, word, clock=clock, sleep=sleep, limit_bytes=limit_bytes
        )

    @property
    def waits(self) -> bool:
        """Whether records wait for the disk."""
        return self._queue.waits

    def append(self, record: bytes) -> None:
        """Add a record; one of a file of lines ends with a line feed."""
        self._queue.put(record)

    def flush(self, patience_s: float = 0.0) -> bool:
        """Write what waits, with attempts for this time. Returns whether nothing waits any more."""
        return self._queue.flush(patience_s)

    def close(self, patience_s: float = _PATIENCE_S) -> None:
        """Write what waits, tell what could not be written, and close the file.

        It may be called again, and the file may be added to again.
        """
        self._queue.close(patience_s)
        self._forget()

    def _write(self, records: Sequence[bytes]) -> tuple[int, OSError | None]:
        """Append as many records as the disk takes. Returns their number, and the error."""
        done = 0
        try:
            descriptor = self._open()
            with _locked(descriptor) as locked:
                if locked:
                    self._mend(descriptor)
                while done < len(records):
                    done += _append(descriptor, records[done:])
        except OSError as error:
            self._forget()
            return done, error
        return done, None

    def _open(self) -> int:
        """The descriptor; another process than the one that opened it opens its own.

        A file of lines that was removed is made again; one that was moved is still added to.
        """
        if (
            self._descriptor >= 0
            and self._tail is not Tail.KEPT
            and os.fstat(self._descriptor).st_nlink == 0
        ):
            self._forget()
        if self._descriptor < 0 or self._opened_by != os.getpid():
            self._descriptor, self._opened_by = open_added(self._path), os.getpid()
        return self._descriptor

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0 and self._opened_by == os.getpid():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _mend(self, descriptor: int) -> None:
        """Treat an unfinished line at the end, as nothing writes to it any more."""
        size = os.fstat(descriptor).st_size
        if self._tail is Tail.KEPT or not size or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        if self._tail is Tail.ENDED:
            os.write(descriptor, b"\n")
            return
        begin = max(0, size - _LONGEST_TAIL)
        end = os.pread(descriptor, size - begin, begin)
        torn = end[end.rfind(b"\n") + 1 :]
        aside = self._path.with_name(set_aside_name(self._path.name))
        with contextlib.suppress(OSError), os.fdopen(open_added(aside), "ab", 0) as file:
            file.write(torn + b"\n")
        os.ftruncate(descriptor, size - len(torn))


def set_aside_name(name: str) -> str:
    """The file beside a file of lines that has the lines which did not belong there."""
    return f"{name}.set-aside"


def _append(descriptor: int, records: Sequence[bytes]) -> int:
    """Append records in one write, and take a torn one back. Returns how many are written whole.

    Raises:
        OSError: none is.
    """
    content, error = b"".join(records), None
    written = os.write(descriptor, content)
    if written < len(content):
        try:  # for the reason
            written += os.write(descriptor, content[written:])
        except OSError as refused:
            error = refused
    end = os.lseek(descriptor, 0, os.SEEK_CUR)
    whole = count = 0
    for record in records:
        if whole + len(record) > written:
            break
        whole, count = whole + len(record), count + 1
    if whole < written and os.fstat(descriptor).st_size == end:
        os.ftruncate(descriptor, end - written + whole)
    if not count:
        raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return count


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[bool]:
    """Keep other processes from the file during the block, where that takes no time.

    A process that is stopped with the lock holds no other one up: the block runs without it then.
    """
    locked = False
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        except OSError:
            break  # a file system without locks
        else:
            locked = True
            break
    try:
        yield locked
    finally:
        if locked:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
