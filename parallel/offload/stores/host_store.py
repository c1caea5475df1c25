"""Storages in host memory: pinned, and copied on a stream of their own, when from a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.parallel.offload.stores.slots import ALIGNMENT, Slots, rounded
from holdfast.parallel.offload.stores.store import StoreStatistics

_ARENA = 1 << 30
"""Bytes pinned at a time: a power of two, as torch's host allocator rounds up to one."""


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
        """Copy to host memory what the work queued so far makes; an event that follows the copy."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._copy(source, target)

    def back(self, source: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy on the device, and an event that follows it."""
        with self._beside():
            target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        return target, self._copy(source, target)

    def arrive(self, target: Tensor, event: torch.cuda.Event | None) -> None:
        """Let the work that is queued from now on find what `back` brings."""
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
        """Time that the copies which have ended took; 0 for the CPU, which copies at once."""
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
    """Host memory in which room is taken and given back; grows, pinned for a GPU, and stays."""

    def __init__(self, *, pinned: bool, limit_bytes: int = 0, growth_bytes: int = _ARENA) -> None:
        self._pinned, self._limit, self._growth = pinned, limit_bytes, growth_bytes
        self._parts: list[tuple[Tensor, Slots]] = []

    def take(self, nbytes: int, *, beyond: bool = False) -> tuple[Tensor, tuple[int, int]] | None:
        """uint8[nbytes], and the key that gives it back.

        None when the limit is reached, unless `beyond` it is allowed.
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
        """All of it, for the caller that registers it."""
        return [memory for memory, _ in self._parts]


class HostStore:
    """A `Store` in host memory. For tensors of the CPU it saves nothing: they lie there already."""

    fault = ""

    def __init__(self, device: torch.device, *, limit_bytes: int = 0) -> None:
        """Local.

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
        """Nothing to do: copies go on by themselves."""

    def trim(self) -> None:
        """Nothing to give back: pinned memory is dear to get, and stays."""

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(
            written_bytes=self.written_bytes,
            read_bytes=self.read_bytes,
            busy_s=self._copier.busy_s(),
            room_bytes=self._arena.room_bytes,
            used_bytes=self._arena.used_bytes,
        )

    def close(self) -> None:
        """Nothing to end: torch keeps memory alive for the copies that use it."""


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
