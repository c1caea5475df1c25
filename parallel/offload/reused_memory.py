"""Memory that what comes back is read into: its pages stay, as first touching them costs more than reading."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

from holdfast.parallel.offload.slots import Slots, rounded

_GROWTH = 16 << 20
"""By how much it grows at least, in bytes."""


class ReusedMemory:
    """Page-aligned memory whose parts are used again when the last tensor on them is gone. Local.

    torch's allocator on the CPU gives memory back to the system and gets it as new pages; and buffers a
    little larger than what left would not fit where that was.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[mmap.mmap, Slots]] = []
        self._unused: deque[tuple[int, int]] = deque()
        """Appended to when a tensor's memory is let go, in whatever thread that happens."""

    def take(self, lead: int, nbytes: int) -> Tensor:
        """uint8[nbytes] that begins `lead` bytes (below a page) after the begin of a page."""
        while self._unused:
            number, start = self._unused.popleft()
            self._parts[number][1].give(start)
        region = rounded(lead + nbytes)
        for number, (memory, slots) in enumerate(self._parts):  # noqa: B007
            start = slots.take(region)
            if start is not None:
                break
        else:
            size = max(_GROWTH, region)
            memory, slots = mmap.mmap(-1, size), Slots(size)
            number = len(self._parts)
            self._parts.append((memory, slots))
            start = slots.take(region)
            assert start is not None
        held = (ctypes.c_ubyte * nbytes).from_buffer(memory, start + lead)
        weakref.finalize(held, self._unused.append, (number, start))
        return torch.frombuffer(held, dtype=torch.uint8)

    @property
    def room_bytes(self) -> int:
        return sum(slots.capacity for _, slots in self._parts)
