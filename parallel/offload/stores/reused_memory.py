"""Memory that activations are read back into; its pages stay, as touching new ones costs more."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import deque
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.offload.stores.slots import Slots, rounded

_GROWTH = 16 << 20
"""By how much it grows at least, in bytes."""


class ReusedMemory:
    """Page-aligned memory whose parts are used again when the last tensor on them is gone. Local.

    torch's allocator on the CPU gives memory back to the system and gets it as new pages; and
    buffers a little larger than what left would not fit where that was.
    """

    def __init__(self) -> None:
        self._parts: dict[int, tuple[mmap.mmap, Slots]] = {}
        self._made = 0
        self._touched: set[int] = set()
        self._unused: deque[tuple[int, int]] = deque()
        """Appended to when a tensor's memory is let go, in whatever thread that happens."""

    def take(self, lead: int, nbytes: int) -> Tensor:
        """uint8[nbytes] that begins `lead` bytes (below a page) after the begin of a page."""
        self._collect()
        region = rounded(lead + nbytes)
        found = self._find(region)
        if found is None:
            size = max(_GROWTH, region)
            self._made += 1
            self._parts[self._made] = _huge_pages(size), Slots(size)
            found = self._find(region)
            assert found is not None
        number, start = found
        self._touched.add(number)
        memory, _ = self._parts[number]
        held = _held_bytes(nbytes).from_buffer(memory, start + lead)
        held.let_go = self._unused, (number, start)
        return torch.frombuffer(held, dtype=torch.uint8)

    def trim(self) -> None:
        """Give back to the system what nothing was read into since the last time."""
        self._collect()
        for number, (_, slots) in list(self._parts.items()):
            if number not in self._touched and slots.used == 0:
                del self._parts[number]
        self._touched.clear()

    @property
    def room_bytes(self) -> int:
        """What is held, used or not."""
        return sum(slots.capacity for _, slots in self._parts.values())

    def _find(self, region: int) -> tuple[int, int] | None:
        for number, (_, slots) in self._parts.items():
            start = slots.take(region)
            if start is not None:
                return number, start
        return None

    def _collect(self) -> None:
        while self._unused:
            number, start = self._unused.popleft()
            self._parts[number][1].give(start)


@lru_cache(maxsize=256)
def _held_bytes(nbytes: int) -> Any:
    """The type of `nbytes` bytes that put their name in `let_go`'s queue when they are unused."""

    def let_go(self: Any) -> None:
        queue, name = self.let_go
        queue.append(name)

    return type("HeldBytes", (ctypes.c_ubyte * nbytes,), {"__del__": let_go})


def _huge_pages(size: int) -> mmap.mmap:
    """Memory in pages of 2 MiB where the kernel has them: a drive's requests pin page by page."""
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
