"""Storages in pinned host memory, copied from a GPU on a stream of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.parallel.offload.stores.slots import ALIGNMENT, Slots, rounded
from holdfast.parallel.offload.stores.store import StoreStatistics

_ARENA = 1 << 30
"""Bytes pinned at a time: a power of two, to which torch's host allocator rounds up."""


class Copier:
    """Copies between a device and host memory, beside computation if the device has streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._busy_s = 0.0

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def out(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Copy a tensor to host memory after the work queued so far.

        Returns an event after the copy.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._copy(source, target)

    def back(self, source: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Copy to the device. Returns the tensor on the device, and an event after the copy."""
        with self._beside():
            target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        return target, self._copy(source, target)

    def arrive(self, target: Tensor, event: torch.cuda.Event | None) -> None:
        """Have all work queued from now on wait for the copy that `back` began."""
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            target.record_stream(current)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        if self._stream is None:
            target.copy_(source)
            return None
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begun.record()
            target.copy_(source, non_blocking=True)
            ended.record()
        self._marks.append((begun, ended))
        return ended

    def busy_s(self) -> float:
        """Seconds of the copies that have ended; 0 for the CPU, which copies at once."""
        open_marks = []
        for begun, ended in self._marks:
            if ended.query():
                self._busy_s += begun.elapsed_time(ended) / 1e3
            else:
                open_marks.append((begun, ended))
        self._marks = open_marks
        return self._busy_s


def is_past(event: torch.cuda.Event | None) -> bool:
    """Whether a copy has ended."""
    return event is None or event.query()


class HostMemory:
    """Host memory that gives room and takes it back. It is pinned for a GPU, and never shrinks."""

    def __init__(self, *, pinned: bool, limit_bytes: int = 0, growth_bytes: int = _ARENA) -> None:
        self._pinned, self._limit, self._growth = pinned, limit_bytes, growth_bytes
        self._parts: list[tuple[Tensor, Slots]] = []

    def take(self, nbytes: int, *, beyond: bool = False) -> tuple[Tensor, tuple[int, int]] | None:
        """Take room. Returns uint8[nbytes], and the key that releases it.

        The result is None when the limit is reached, unless `beyond` allows more.
        """
        for number, (memory, slots) in enumerate(self._parts):
            start = slots.take(nbytes)
            if start is not None:
                return memory[start : start + nbytes], (number, start)
        size = max(self._growth, rounded(nbytes))
        if self._limit:
            size = min(size, (self._limit - self.room_bytes) // ALIGNMENT * ALIGNMENT)
        if size < rounded(nbytes):
            if not beyond:
                return None
            size = rounded(nbytes)
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        self._parts.append((memory, Slots(size)))
        return self.take(nbytes)

    def give(self, key: tuple[int, int]) -> None:
        number, start = key
        self._parts[number][1].give(start)

    @property
    def room_bytes(self) -> int:
        return sum(memory.numel() for memory, _ in self._parts)

    @property
    def used_bytes(self) -> int:
        return sum(slots.used for _, slots in self._parts)

    @property
    def memory(self) -> list[Tensor]:
        """All of the memory, for a caller that registers it."""
        return [memory for memory, _ in self._parts]


class HostStore:
    """A `Store` in host memory. It saves nothing for CPU tensors, which lie there already."""

    fault = ""

    def __init__(self, device: torch.device, *, limit_bytes: int = 0) -> None:
        """Nothing is pinned yet.

        Args:
            limit_bytes: the most host memory; 0: no limit.
        """
        pinned = device.type == "cuda"
        self._arena = HostMemory(
            pinned=pinned, limit_bytes=limit_bytes, growth_bytes=_ARENA if pinned else 1 << 26
        )
        self._copier = Copier(device)
        self.written_bytes = self.read_bytes = 0

    def put(self, source: Tensor) -> HostCopy | None:
        room = self._arena.take(source.numel())
        return None if room is None else HostCopy(self, self._arena, self._copier, *room, source)

    def advance(self) -> None:
        """Does nothing: copies go on by themselves."""

    def trim(self) -> None:
        """Does nothing: pinned memory is slow to allocate, so it stays."""

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(
            written_bytes=self.written_bytes,
            read_bytes=self.read_bytes,
            busy_s=self._copier.busy_s(),
            room_bytes=self._arena.room_bytes,
            used_bytes=self._arena.used_bytes,
        )

    def close(self) -> None:
        """Does nothing: torch keeps memory alive for the copies that use it."""


class HostCopy:
    """A `StoredCopy` in host memory."""

    failed: OSError | None = None

    def __init__(
        self,
        store: HostStore,
        arena: HostMemory,
        copier: Copier,
        memory: Tensor,
        key: tuple[int, int],
        source: Tensor,
    ) -> None:
        self._store, self._arena, self._copier = store, arena, copier
        self._memory, self._key = memory, key
        self.nbytes = source.numel()
        self._source: Tensor | None = source
        self._event = copier.out(source, memory)
        self._target: Tensor | None = None
        self._released = False
        store.written_bytes += self.nbytes

    @property
    def source_free(self) -> bool:
        if self._source is not None and is_past(self._event):
            self._source = None
        return self._source is None

    def fetch(self) -> bool:
        if self._target is None:
            self._target, self._event = self._copier.back(self._memory)
            self._store.read_bytes += self.nbytes
        return True

    def take(self) -> Tensor:
        self.fetch()
        target, self._target = self._target, None
        assert target is not None
        self._copier.arrive(target, self._event)
        return target

    def release(self) -> bool:
        if not is_past(self._event):
            return False
        self._source = self._target = None
        if not self._released:
            self._arena.give(self._key)
            self._released = True
        return True
