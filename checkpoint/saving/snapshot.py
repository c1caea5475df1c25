"""The lazy snapshot: state is copied while the next step computes, and each block is fenced.

State does not change from one optimizer update to the next, so the copy runs beside the following forward
and backward passes (Maurya et al. 2024, DataStates-LLM). Before the optimizer overwrites something it
calls `fence`, which copies in the caller's thread whatever has not been copied yet. Exact-mode safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from holdfast import _native
from holdfast.checkpoint.saving.arena import Arena, Cancelled, Deadline, FileStream
from holdfast.parallel.errors import CheckpointError

ALL = 1 << 62
"""A fence number behind which everything is copied."""
_COPY_BYTES = 1 << 20
"""What is copied under the lock at a time: a fence waits for no more than this."""


@dataclass(frozen=True, slots=True)
class SnapshotItem:
    """Bytes of this rank that go to one place of one file."""

    source: Tensor
    """A view of the live state; contiguous."""
    file: str
    offset: int
    before: int
    """The fence that must not be passed until this is copied."""


class Snapshot:
    """One save of one rank, from live state to the file engine.

    `run` is called once, by a background thread; `fence` by the thread that trains.
    """

    def __init__(
        self,
        items: Sequence[SnapshotItem],
        arena: Arena,
        deadline: Deadline,
    ) -> None:
        """Args:
        items: in ascending order of `before`.
        """
        self._items = items
        self._arena = arena
        self._deadline = deadline
        self._streams: dict[str, FileStream] = {}
        self._lock = threading.Lock()
        self._opened = threading.Event()
        self._next = 0
        self._done = 0
        self._crc = 0
        self._finished = not items
        self.error: Exception | None = None
        self.checksums: list[int] = []
        """CRC-32C of each item that is copied, in their order."""
        self.stall_s = 0.0
        """Time that fences kept the training thread."""
        self._device_stream, self._ready = _side_stream(items)

    @property
    def copied(self) -> bool:
        """Whether the live state is no longer needed: all is copied, or the save has failed."""
        return self._finished or self.error is not None

    def use(self, files: Mapping[str, int]) -> None:
        """Name the engine's handle of each file that is written; before anything is copied."""
        self._streams = {name: FileStream(self._arena, handle) for name, handle in files.items()}

    def open(self, prepare: Callable[[], None] | None = None) -> None:
        """Let copying begin, from the background thread and from fences.

        Args:
            prepare: runs first, in the calling thread; fences wait for it.
        """
        try:
            if prepare is not None:
                prepare()
        except Exception as error:
            self.error = error
            raise
        finally:
            self._opened.set()

    def write_now(self, source: Tensor, file: str, offset: int) -> int:
        """Copy bytes that are no item, in the calling thread; returns their CRC-32C.

        Raises:
            OSError, Cancelled: as `run`.
        """
        crc = done = 0
        address = source.data_ptr()
        nbytes = source.numel() * source.element_size()
        while done < nbytes:
            memory, target = self._streams[file].room(offset + done, self._deadline)
            size = min(nbytes - done, memory.numel())
            crc = _native.copy_crc32c(target, address + done, size, crc)
            self._streams[file].filled(size)
            done += size
        return crc

    def run(self) -> None:
        """Copy everything; in the background thread.

        Raises:
            OSError: a file could not be written.
            Cancelled: the deadline passed.
        """
        while not self._finished:
            with self._lock:
                if self.error is not None:
                    raise self.error
                self._copy_next()
        for stream in self._streams.values():
            stream.flush()

    def fence(self, number: int) -> int:
        """Return once everything with `before` <= number is copied; helps copying.

        Returns:
            The highest number whose fence is open as well.
        """
        if not self.copied and self._behind(number):
            began = perf_counter()
            self._wait(number)
            self.stall_s += perf_counter() - began
        place = self._next
        if self.error is not None or place == len(self._items):
            return ALL
        return self._items[place].before - 1

    def abort(self, reason: str = "") -> None:
        """Give the save up: fences open at once. From any thread; never blocks."""
        self.error = self.error or (CheckpointError(reason) if reason else Cancelled())
        self._deadline.cancelled = True
        self._opened.set()

    def cancel(self, reason: str = "") -> None:
        """Give the save up, and return once nothing reads the state any more."""
        self.abort(reason)
        with self._lock:
            pass

    def _behind(self, number: int) -> bool:
        return not self.copied and self._items[self._next].before <= number

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
        """Copy the next bytes; the caller holds the lock."""
        if self._finished:
            return
        item = self._items[self._next]
        nbytes = item.source.numel() * item.source.element_size()
        try:
            stream = self._streams[item.file]
            memory, address = stream.room(item.offset + self._done, self._deadline)
            size = min(nbytes - self._done, memory.numel(), _COPY_BYTES)
            if size:
                self._transfer(item.source, memory, address, size)
                stream.filled(size)
        except (OSError, Cancelled) as error:
            self.error = error
            raise
        self._done += size
        if self._done == nbytes:
            self.checksums.append(self._crc)
            self._crc, self._done = 0, 0
            self._next += 1
            self._finished = self._next == len(self._items)

    def _transfer(self, source: Tensor, memory: Tensor, address: int, size: int) -> None:
        if self._device_stream is None:
            begin = source.data_ptr() + self._done
            self._crc = _native.copy_crc32c(address, begin, size, self._crc)
            return
        with torch.cuda.stream(self._device_stream):
            assert self._ready is not None
            self._device_stream.wait_event(self._ready)
            raw = source.view(-1).view(torch.uint8)[self._done : self._done + size]
            memory[:size].copy_(raw, non_blocking=True)
        self._device_stream.synchronize()
        self._crc = _native.crc32c(address, size, self._crc)


def _side_stream(
    items: Sequence[SnapshotItem],
) -> tuple[torch.cuda.Stream | None, torch.cuda.Event | None]:
    """A stream beside the one that computes, and the event that says the state is complete."""
    device = next((item.source.device for item in items if item.source.is_cuda), None)
    if device is None:
        return None, None
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))
    return torch.cuda.Stream(device), ready
