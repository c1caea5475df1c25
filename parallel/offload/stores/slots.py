"""Slots in a file or a buffer: room is taken, released and reused. Pure."""

from __future__ import annotations

from bisect import bisect_left

ALIGNMENT = 4096
"""The alignment of every slot, in bytes: the unit of reads and writes past the page cache."""


def rounded(nbytes: int) -> int:
    """The room that `nbytes` bytes take: a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Slots:
    """The bytes from 0 to `capacity`, of which intervals are taken and released.

    The smallest gap that is large enough is taken, and neighbouring gaps merge. So a step that
    stores the same sizes in the same order finds the room of the step before.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._starts: list[int] = [0] if capacity else []
        self._stops: list[int] = [capacity] if capacity else []
        self._taken: dict[int, int] = {}
        self.capacity = capacity
        self.used = 0
        """Bytes taken now, rounded up."""

    def grow(self, nbytes: int) -> None:
        """Add `nbytes` bytes, a multiple of `ALIGNMENT`, at the end."""
        start, self.capacity = self.capacity, self.capacity + nbytes
        self._insert(start, self.capacity)

    def missing(self, nbytes: int) -> int:
        """The bytes of growth that `take(nbytes)` needs to succeed; 0: none."""
        wanted = rounded(nbytes)
        if any(b - a >= wanted for a, b in zip(self._starts, self._stops, strict=True)):
            return 0
        last = self._stops[-1] - self._starts[-1] if self._ends_free() else 0
        return wanted - last

    def take(self, nbytes: int) -> int | None:
        """Take room for 1 byte or more. Returns its start; None when no gap is large enough."""
        wanted = rounded(nbytes)
        best = -1
        smallest = 0
        for index, (start, stop) in enumerate(zip(self._starts, self._stops, strict=True)):
            size = stop - start
            if size >= wanted and (best < 0 or size < smallest):
                best, smallest = index, size
        if best < 0:
            return None
        start = self._starts[best]
        if smallest == wanted:
            del self._starts[best], self._stops[best]
        else:
            self._starts[best] += wanted
        self._taken[start] = wanted
        self.used += wanted
        return start

    def give(self, start: int) -> None:
        """Release the room that begins at `start`, a result of `take`."""
        size = self._taken.pop(start)
        self.used -= size
        self._insert(start, start + size)

    def _ends_free(self) -> bool:
        return bool(self._stops) and self._stops[-1] == self.capacity

    def _insert(self, start: int, stop: int) -> None:
        place = bisect_left(self._starts, start)
        joins_next = place < len(self._starts) and self._starts[place] == stop
        joins_before = place > 0 and self._stops[place - 1] == start
        if joins_next and joins_before:
            self._stops[place - 1] = self._stops[place]
            del self._starts[place], self._stops[place]
        elif joins_next:
            self._starts[place] = start
        elif joins_before:
            self._stops[place - 1] = stop
        else:
            self._starts.insert(place, start)
            self._stops.insert(place, stop)
