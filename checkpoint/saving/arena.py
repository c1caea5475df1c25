"""The arena: bounded memory between state and disk, in aligned slabs that are filled and written.

Slabs are reused after their write. Exact-mode safe: bytes are only copied.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from holdfast import _native
from holdfast.checkpoint.format import ALIGNMENT
from holdfast.parallel.errors import CheckpointError

SLAB_BYTES = 4 << 20
_SLICE_S = 0.1
"""The interval at which a wait for the disk checks that the save is still wanted, in seconds."""


class Cancelled(Exception):
    """The save that this work belongs to was given up."""


class Deadline:
    """The deadline of a save, and whether the save was given up before."""

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begin to count.

        Args:
            clock: seconds since any moment; `pause` waits for so many of them.
        """
        self.seconds = seconds
        self.cancelled = False
        self.pause = pause
        """The pause between two looks of a wait that polls until the deadline."""
        self._clock, self._at = clock, clock() + seconds

    def check(self) -> None:
        """Raise `Cancelled` once the deadline has passed or the save was given up."""
        if self.cancelled or self.is_over():
            self.cancelled = True
            raise Cancelled

    def is_over(self, patience_s: float = 0.0) -> bool:
        """Whether the deadline passed longer ago than `patience_s`."""
        return self._clock() > self._at + patience_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._at - self._clock())


def _mapped(nbytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes)
    except (OSError, OverflowError) as error:
        raise CheckpointError(
            f"an arena of {nbytes:,} bytes: there is not so much memory here; make it smaller "
            "(arena_bytes, checkpoint.arena_mib)"
        ) from error


class Arena:
    """Slabs of one size, each free, being filled, or being written. One save at a time."""

    def __init__(self, engine: _native.FileEngine, nbytes: int, *, pinned: bool = False) -> None:
        """Allocate the memory and register it with the engine.

        Args:
            nbytes: the size, rounded up to whole slabs, two at least.
            pinned: use page-locked memory, for copies from a GPU.
        """
        self._engine = engine
        count = max(2, -(-nbytes // SLAB_BYTES))
        self.nbytes = count * SLAB_BYTES
        if pinned:
            self._memory = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
        else:
            mapped = _mapped(self.nbytes)
            mapped.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        engine.register_buffer(self._memory.data_ptr(), self.nbytes)
        self._free = list(range(count))
        self._writing: deque[tuple[int, int]] = deque()

    def take(self, deadline: Deadline) -> int:
        """Take a free slab; wait for the oldest write when there is none.

        Raises:
            OSError: the oldest write failed.
            Cancelled: the deadline passed.
        """
        self._collect()
        while not self._free:
            deadline.check()
            self._reap(_SLICE_S)
        return self._free.pop()

    def tensor(self, slab: int) -> Tensor:
        """The slab's memory: uint8[SLAB_BYTES]."""
        return self._memory[slab * SLAB_BYTES : (slab + 1) * SLAB_BYTES]

    def address(self, slab: int) -> int:
        return self._memory.data_ptr() + slab * SLAB_BYTES

    def write(self, slab: int, file: int, offset: int, begin: int, nbytes: int) -> None:
        """Write a part of a slab to a file. The slab is free again once the write is done."""
        try:
            ticket = self._engine.write(file, self.address(slab) + begin, offset, nbytes)
        except OSError:
            self._free.append(slab)
            raise
        self._writing.append((ticket, slab))

    def give_back(self, slab: int) -> None:
        """Free a slab that nothing was written from."""
        self._free.append(slab)

    def drain(self, deadline: Deadline) -> None:
        """Wait until all writes have ended. Raises the first failure, as `take` does."""
        while self._writing:
            deadline.check()
            self._reap(_SLICE_S)

    def recover(self, seconds: float) -> None:
        """Wait after a failed save until all writes have ended, whatever their outcome.

        Raises:
            CheckpointError: the device still holds on to a buffer after `seconds`.
        """
        deadline = Deadline(seconds)
        while self._writing:
            with contextlib.suppress(OSError):
                if not self._reap(deadline.left_s):
                    raise CheckpointError(
                        "a write of the previous checkpoint has not come back from the device; no "
                        "checkpoint can be written until it does"
                    )

    def _collect(self) -> None:
        while self._writing and self._engine.done(self._writing[0][0]):
            self._reap(0.0)

    def _reap(self, timeout_s: float) -> bool:
        """Free the slab of the oldest write if it ends in time; raise the write's error."""
        ticket, slab = self._writing[0]
        finished = False
        try:
            finished = self._engine.wait(ticket, timeout_s)
        except OSError:
            finished = True
            raise
        finally:
            if finished:
                self._writing.popleft()
                self._free.append(slab)
        return finished


class FileStream:
    """The bytes on their way to one file, gathered in a slab that is written when it is full.

    The bytes in the slab are as far from a multiple of ALIGNMENT as in the file, so that the engine
    can write them directly.
    """

    def __init__(self, arena: Arena, file: int) -> None:
        self._arena = arena
        self._file = file
        self._slab = -1
        self._begin = 0
        self._fill = 0
        self._offset = 0
        """The offset of the slab's first used byte in the file."""

    def room(self, offset: int, deadline: Deadline) -> Tensor:
        """The memory for the bytes from `offset` of the file on: uint8, as many as have room."""
        if self._slab >= 0 and (
            self._offset + self._fill - self._begin != offset or self._fill == SLAB_BYTES
        ):
            self.flush()
        if self._slab < 0:
            self._slab = self._arena.take(deadline)
            self._offset = offset
            self._begin = self._fill = offset % ALIGNMENT
        return self._arena.tensor(self._slab)[self._fill :]

    def filled(self, nbytes: int) -> None:
        """Count `nbytes` that were put into the memory of `room`."""
        self._fill += nbytes

    def flush(self) -> None:
        """Write the content of the slab to the file."""
        if self._slab < 0:
            return
        slab, self._slab = self._slab, -1
        if self._fill == self._begin:
            self._arena.give_back(slab)
            return
        self._arena.write(slab, self._file, self._offset, self._begin, self._fill - self._begin)
