"""Bounded memory between the state and the disk: aligned slabs that are filled, written and reused.

Exact-mode safe: it only copies bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections import deque

import torch
from torch import Tensor

from holdfast import _native
from holdfast.checkpoint.format import ALIGNMENT
from holdfast.parallel.errors import CheckpointError

SLAB_BYTES = 4 << 20
_SLICE_S = 0.1
"""How long a wait for the disk lasts before it looks whether it is still wanted."""


class Cancelled(Exception):
    """The save that this work belongs to was given up."""


class Deadline:
    """When a save is given up, and whether it was."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = time.monotonic() + seconds
        self.cancelled = False

    def check(self) -> None:
        """Raise `Cancelled` once the time is over or the save was given up."""
        if self.cancelled or time.monotonic() > self.at:
            self.cancelled = True
            raise Cancelled

    @property
    def left_s(self) -> float:
        return max(0.0, self.at - time.monotonic())


class Arena:
    """Slabs of one size: each is free, being filled, or being written. One save at a time."""

    def __init__(self, engine: _native.FileEngine, nbytes: int, *, pinned: bool = False) -> None:
        """Set the memory aside and register it with the engine.

        Args:
            nbytes: rounded up to whole slabs, two at least.
            pinned: page-locked memory, for copies from a GPU.
        """
        self._engine = engine
        count = max(2, -(-nbytes // SLAB_BYTES))
        self.nbytes = count * SLAB_BYTES
        if pinned:
            self._memory = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
        else:
            mapped = mmap.mmap(-1, self.nbytes)
            mapped.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        engine.register_buffer(self._memory.data_ptr(), self.nbytes)
        self._free = list(range(count))
        self._writing: deque[tuple[int, int]] = deque()

    def take(self, deadline: Deadline) -> int:
        """A free slab; waits for the oldest write when there is none.

        Raises:
            OSError: that write failed.
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
        """Write a part of a slab, which is free again once that is done."""
        try:
            ticket = self._engine.write(file, self.address(slab) + begin, offset, nbytes)
        except OSError:
            self._free.append(slab)
            raise
        self._writing.append((ticket, slab))

    def give_back(self, slab: int) -> None:
        """Free a slab of which nothing was written."""
        self._free.append(slab)

    def drain(self, deadline: Deadline) -> None:
        """Wait until nothing is being written; raises the first failure, as `take` does."""
        while self._writing:
            deadline.check()
            self._reap(_SLICE_S)

    def recover(self, seconds: float) -> None:
        """After a failed save: let what is in flight end, whatever comes of it.

        Raises:
            CheckpointError: the device still holds on to a buffer after `seconds`.
        """
        until = time.monotonic() + seconds
        while self._writing:
            with contextlib.suppress(OSError):
                if not self._reap(max(0.0, until - time.monotonic())):
                    raise CheckpointError(
                        "a write of the previous checkpoint has not come back from the device; no "
                        "checkpoint can be written until it does"
                    )

    def _collect(self) -> None:
        while self._writing and self._engine.done(self._writing[0][0]):
            self._reap(0.0)

    def _reap(self, timeout_s: float) -> bool:
        """Free the slab of the oldest write, if that ends in time; raises what it ended with."""
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
    """Bytes on their way to one file: gathered in a slab, which is written when it is full.

    The slab's bytes lie at the same distance from a multiple of ALIGNMENT as in the file, so that
    the engine can write them directly.
    """

    def __init__(self, arena: Arena, file: int) -> None:
        self._arena = arena
        self._file = file
        self._slab = -1
        self._begin = 0
        self._fill = 0
        self._offset = 0
        """Of the slab's first used byte, in the file."""

    def room(self, offset: int, deadline: Deadline) -> Tensor:
        """Where the bytes at `offset` of the file go: uint8, as many as have room."""
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
        """`nbytes` were put where `room` said."""
        self._fill += nbytes

    def flush(self) -> None:
        """Send what is in the slab to the file."""
        if self._slab < 0:
            return
        slab, self._slab = self._slab, -1
        if self._fill == self._begin:
            self._arena.give_back(slab)
            return
        self._arena.write(slab, self._file, self._offset, self._begin, self._fill - self._begin)
