"""The lazy snapshot: state is copied while the next step computes, with a fence for each block.

State does not change from one optimizer update to the next, so the copy runs beside the following
forward and backward passes (Maurya et al. 2024, DataStates-LLM). Before the optimizer overwrites a
block it calls `fence`, which copies the rest of that block in the caller's thread. Exact-mode safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from holdfast import _native
from holdfast.checkpoint.saving.arena import Arena, Cancelled, Deadline, FileStream
from holdfast.parallel.errors import CheckpointError

ALL = 1 << 62
"""The fence number that protects everything."""
_COPY_BYTES = 1 << 20
"""Bytes copied under the lock at a time; a fence waits for no more than this."""


@dataclass(frozen=True, slots=True)
class SnapshotItem:
    """Bytes of this rank that go to one place of one file."""

    source: Tensor
    """A view of the live state; contiguous."""
    file: str
    offset: int
    before: int
    """The fence that must not open before this is copied."""


@dataclass(slots=True)
class _Cursor:
    """The position of the copy: all items before `item`, and `done` bytes of it, are copied."""

    item: int = 0
    done: int = 0
    crc: int = 0
    """CRC-32C of the copied bytes of the item."""
    checksums: list[int] = field(default_factory=list)
    """CRC-32C of the copied items."""

    def advance(self, size: int, nbytes: int) -> None:
        """Count `size` bytes more of an item of `nbytes`."""
        self.done += size
        if self.done == nbytes:
            self.checksums.append(self.crc)
            self.crc, self.done = 0, 0
            self.item += 1


class Snapshot:
    """The snapshot of one save of one rank, from live state to the file engine.

    A background thread calls `run`, once. The training thread calls `fence`, any thread `abort`.
    """

    def __init__(self, items: Sequence[SnapshotItem], arena: Arena, deadline: Deadline) -> None:
        """Note the items; copying begins with `open`.

        Args:
            items: in ascending order of `before`.
            arena: the arena; no other save may use it meanwhile.
            deadline: the deadline of the save.
        """
        self._items = items
        self._arena = arena
        self._deadline = deadline
        self._streams: dict[str, FileStream] = {}
        self._lock = threading.Lock()
        """Held while bytes are copied and the cursor advances."""
        self._opened = threading.Event()
        self._cursor = _Cursor()
        self._copy = _copier_of(items)
        self.error: Exception | None = None
        self.stall_s = 0.0
        """Seconds that fences held up the training thread."""

    @property
    def checksums(self) -> list[int]:
        """CRC-32C of each copied item, in their order."""
        return self._cursor.checksums

    @property
    def copied(self) -> bool:
        """Whether the live state is no longer needed: all is copied, or the save has failed."""
        return self._finished or self.error is not None

    @property
    def _finished(self) -> bool:
        return self._cursor.item == len(self._items)

    def use(self, files: Mapping[str, int]) -> None:
        """Set the engine's handle of each file, before anything is copied."""
        self._streams = {name: FileStream(self._arena, handle) for name, handle in files.items()}

    def open(self, prepare: Callable[[], None] | None = None) -> None:
        """Begin copying, from the background thread and from fences.

        Args:
            prepare: called first, in the calling thread; fences wait for it.
        """
        try:
            if prepare is not None:
                prepare()
        except Exception as error:
            self.error = self.error or error
            raise
        finally:
            self._opened.set()

    def write_now(self, source: Tensor, file: str, offset: int) -> int:
        """Copy bytes that are not an item, in the calling thread. Returns their CRC-32C.

        Raises:
            OSError, Cancelled: as for `run`.
        """
        crc = done = 0
        address = source.data_ptr()
        nbytes = source.numel() * source.element_size()
        while done < nbytes:
            memory = self._streams[file].room(offset + done, self._deadline)
            size = min(nbytes - done, memory.numel())
            crc = _native.copy_crc32c(memory.data_ptr(), address + done, size, crc)
            self._streams[file].filled(size)
            done += size
        return crc

    def run(self) -> None:
        """Copy all items, in the background thread.

        Raises:
            OSError: a file could not be written.
            Cancelled: the deadline passed.
        """
        while not self._finished:
            with self._lock:
                if self.error is not None:
                    raise self.error
                if not self._finished:
                    self._copy_next()
        for stream in self._streams.values():
            stream.flush()

    def fence(self, number: int) -> int:
        """Return once everything with `before` <= `number` is copied; copies in the calling thread.

        Returns:
            The highest number of an open fence.
        """
        if self._behind(number):
            began = perf_counter()
            self._wait(number)
            self.stall_s += perf_counter() - began
        item = self._cursor.item
        if self.error is not None or item == len(self._items):
            return ALL
        return self._items[item].before - 1

    def abort(self, reason: str = "") -> None:
        """Give the save up: fences open at once. From any thread; never blocks."""
        self.error = self.error or (CheckpointError(reason) if reason else Cancelled())
        self._deadline.cancelled = True
        self._opened.set()

    def _behind(self, number: int) -> bool:
        item = self._cursor.item
        return self.error is None and item < len(self._items) and self._items[item].before <= number

    def _wait(self, number: int) -> None:
        while not self._opened.wait(0.1):
            if self._deadline.cancelled or self._deadline.left_s == 0:
                self.error = self.error or Cancelled()
                return
        while self._behind(number):
            if not self._lock.acquire(timeout=0.1):
                if self._deadline.left_s == 0:
                    self.abort()
                continue
            try:
                if self._behind(number):
                    self._copy_next()
            except (OSError, Cancelled):
                return
            finally:
                self._lock.release()

    def _copy_next(self) -> None:
        """Copy the next bytes. The caller holds the lock, and there are bytes to copy."""
        cursor = self._cursor
        item = self._items[cursor.item]
        nbytes = item.source.numel() * item.source.element_size()
        try:
            stream = self._streams[item.file]
            memory = stream.room(item.offset + cursor.done, self._deadline)
            size = min(nbytes - cursor.done, memory.numel(), _COPY_BYTES)
            if size:
                cursor.crc = self._copy(item.source, cursor.done, memory[:size], cursor.crc)
                stream.filled(size)
        except (OSError, Cancelled) as error:
            self.error = self.error or error  # a reason that was given to `abort` stays
            raise
        cursor.advance(size, nbytes)


_Copier = Callable[[Tensor, int, Tensor, int], int]
"""(source, first byte, memory: uint8[bytes], CRC-32C before them) -> CRC-32C after them."""


def _copy_from_host(source: Tensor, begin: int, memory: Tensor, crc: int) -> int:
    return _native.copy_crc32c(memory.data_ptr(), source.data_ptr() + begin, memory.numel(), crc)


def _copier_of(items: Sequence[SnapshotItem]) -> _Copier:
    """The function that copies from the items' device; on a GPU, beside the computing stream."""
    device = next((item.source.device for item in items if item.source.is_cuda), None)
    if device is None:
        return _copy_from_host
    complete = torch.cuda.Event()
    # The state is complete once the computing stream has reached this point.
    complete.record(torch.cuda.current_stream(device))
    stream = torch.cuda.Stream(device)

    def copy(source: Tensor, begin: int, memory: Tensor, crc: int) -> int:
        with torch.cuda.stream(stream):
            stream.wait_event(complete)
            raw = source.view(-1).view(torch.uint8)[begin : begin + memory.numel()]
            memory.copy_(raw, non_blocking=True)
        stream.synchronize()
        return _native.crc32c(memory.data_ptr(), memory.numel(), crc)

    return copy
