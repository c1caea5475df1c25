"""A nameless file on a drive that gives room and takes it back; it ends with its process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

from holdfast import _native
from holdfast.parallel.errors import ConfigError, OffloadError
from holdfast.parallel.offload.stores.slots import ALIGNMENT, Slots
from holdfast.parallel.offload.stores.store import StoreStatistics

_GROWTH = 64 << 20
"""The least growth of the file at a time, in bytes."""
_KEPT_FREE = 0.05
"""The fraction of the filesystem left free for other writers, checkpoints first."""
_QUEUE_DEPTH = 1024
"""Requests of 1 MiB in flight; the maker of one more has to wait."""


class DriveRequest(NamedTuple):
    """One request to the drive."""

    ticket: int
    due_s: float
    """The time of the rate limit's clock from which it may count as done."""


class RateLimit:
    """The times from which transfers count as done, to keep to a rate. Local."""

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = monotonic,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        """Nothing is under way.

        Args:
            bytes_per_s: the highest rate; 0: no limit.
        """
        self.busy_s = 0.0
        """The time that all transfers took at the rate."""
        self._bytes_per_s, self._clock, self._pause = bytes_per_s, clock, pause
        self._due_s = 0.0

    def due_s(self, nbytes: int) -> float:
        """The time from which a transfer that begins now may count as done; 0.0: any."""
        if not self._bytes_per_s:
            return 0.0
        took_s = nbytes / self._bytes_per_s
        self.busy_s += took_s
        self._due_s = max(self._due_s, self._clock()) + took_s
        return self._due_s

    def is_past(self, due_s: float) -> bool:
        """Whether a time of `due_s` has come."""
        return not due_s or self._clock() >= due_s

    def wait(self, due_s: float) -> None:
        """Wait until a time of `due_s`."""
        if due_s:
            self._pause(max(0.0, due_s - self._clock()))


class DiskFile:
    """Room on a drive and asynchronous transfers to and from it. Local.

    The file has no name (`O_TMPFILE`, or removed as soon as it is open): no other run can meet it,
    deleting its folder does not harm it, and its room is free again even after SIGKILL.
    """

    def __init__(
        self, folder: str | Path, *, limit_bytes: int = 0, bytes_per_s: float = 0.0
    ) -> None:
        """Open a file in a folder. Local.

        Args:
            folder: a folder on the drive.
            limit_bytes: the most room on the drive; 0: all of it but a twentieth.
            bytes_per_s: the highest transfer rate; 0: no limit.
        Raises:
            ConfigError: the folder does not allow a file to be made.
        """
        self._limit, self._rate = limit_bytes, RateLimit(bytes_per_s)
        self._slots = Slots()
        self._refused = False
        self.fault = ""
        """The reason to take no more room; taken room stays in use unless a write failed."""
        self.engine = _native.FileEngine(queue_depth=_QUEUE_DEPTH, background=True)
        """The requests' engine; tests inject faults into it."""
        try:
            self._descriptor = _unnamed_file(Path(folder))
        except OSError as error:
            raise ConfigError(
                f"activations cannot be offloaded to {str(folder)!r}: {error.strerror}; name a "
                "folder on the drive that may be written to"
            ) from error
        self._file = self.engine.open(f"/proc/self/fd/{self._descriptor}", write=True)

    def take(self, nbytes: int) -> int | None:
        """Take room. Returns its offset, a multiple of 4096; None when there is no room."""
        if self._refused:
            return None
        offset = self._slots.take(nbytes)
        if offset is None and not self.fault and self._grow(self._slots.missing(nbytes)):
            offset = self._slots.take(nbytes)
        return offset

    def give(self, offset: int) -> None:
        """Release the room at `offset`."""
        self._slots.give(offset)

    def refuse(self, error: OSError) -> None:
        """Give no more room, because a write has failed."""
        self._refused = True
        self.fault = f"the drive failed ({error.strerror or error})"

    def write(self, offset: int, address: int, nbytes: int) -> DriveRequest:
        """Begin to write memory, which must not change until the request is done."""
        return self._transfer(self.engine.write(self._file, address, offset, nbytes), nbytes)

    def read(self, offset: int, address: int, nbytes: int) -> DriveRequest:
        """Begin to read into memory."""
        return self._transfer(self.engine.read(self._file, address, offset, nbytes), nbytes)

    def done(self, request: DriveRequest) -> bool:
        """Whether the request has ended, well or not; `wait` then returns at once."""
        return self.engine.done(request.ticket) and self._rate.is_past(request.due_s)

    def wait(self, request: DriveRequest) -> None:
        """Wait for a request, once.

        Raises:
            OSError: the request failed.
        """
        self.engine.wait(request.ticket)
        self._rate.wait(request.due_s)

    def statistics(self) -> StoreStatistics:
        counts = self.engine.statistics()
        return StoreStatistics(
            written_bytes=counts["bytes_written"],
            read_bytes=counts["bytes_read"],
            busy_s=max(counts["busy_ns"] / 1e9, self._rate.busy_s),
            room_bytes=self._slots.capacity,
            used_bytes=self._slots.used,
        )

    def close(self) -> None:
        """Wait for all transfers and give the room on the drive back."""
        if self._descriptor >= 0:
            self.engine.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def _transfer(self, ticket: int, nbytes: int) -> DriveRequest:
        return DriveRequest(ticket, self._rate.due_s(nbytes))

    def _grow(self, missing: int) -> bool:
        """Reserve room on the drive ahead, so that a later write cannot lack it."""
        capacity = self._slots.capacity
        if self._limit and capacity + missing > self._limit:
            return False
        most = max(missing, _GROWTH)
        if self._limit:
            most = min(most, (self._limit - capacity) // ALIGNMENT * ALIGNMENT)
        reason = ""
        for nbytes in (most, missing):
            status = os.fstatvfs(self._descriptor)
            left = status.f_bavail * status.f_frsize - nbytes
            if left < _KEPT_FREE * status.f_blocks * status.f_frsize:
                reason = "the drive is full, but for the twentieth that is left free"
                continue
            try:
                os.posix_fallocate(self._descriptor, capacity, nbytes)
            except OSError as error:
                reason = f"the drive gives no more room ({error.strerror})"
                continue
            self._slots.grow(nbytes)
            return True
        self.fault = reason
        return False


def unreadable(nbytes: int, error: OSError) -> OffloadError:
    """The error to raise when activations are lost."""
    return OffloadError(
        f"{nbytes} bytes of activations cannot be read back from the drive "
        f"({error.strerror or error}); use another one, or set offload.activations = 'none'"
    )


def _unnamed_file(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    descriptor, name = tempfile.mkstemp(prefix=".holdfast-activations-", dir=folder)
    os.unlink(name)
    return descriptor
