"""Memory that activations are read back into. Its pages stay, since new pages cost more."""

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
"""The least growth at a time, in bytes."""


class ReusedMemory:
    """Page-aligned memory whose parts are reused when the last tensor on them is gone. Local.

    torch's CPU allocator returns memory to the system and gets it back as new pages. Buffers
    slightly larger than the freed one would also not fit in its place.
    """

    def __init__(self) -> None:
        self._parts: dict[int, tuple[mmap.mmap, Slots]] = {}
        self._made = 0
        self._touched: set[int] = set()
        self._unused: deque[tuple[int, int]] = deque()
        """The memory of freed tensors, appended in any thread."""

    def take(self, lead: int, nbytes: int) -> Tensor:
        """Take uint8[nbytes] that begins `lead` bytes, less than a page, into a page."""
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
        """Return to the system the memory that nothing was read into since the last call."""
        self._collect()
        for number, (_, slots) in list(self._parts.items()):
            if number not in self._touched and slots.used == 0:
                del self._parts[number]
        self._touched.clear()

    @property
    def room_bytes(self) -> int:
        """The bytes held, used or not."""
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
    """The type of `nbytes` bytes that put their name in `let_go`'s queue once they are unused."""

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
