"""Storages on their way out, and room that can be released. Local."""

from __future__ import annotations

from collections import deque

from holdfast.parallel.offload.hooks.record import Dead, Record
from holdfast.parallel.offload.stores import StoredCopy


class Outgoing:
    """Frees the memory of sent storages, and the room of storages that no graph needs any more."""

    def __init__(self) -> None:
        self.dead: deque[Dead] = deque()
        """The remains of records that the garbage collector has removed."""
        self._leaving: list[Record] = []
        self._leaving_bytes = 0

    def __contains__(self, record: Record) -> bool:
        return record in self._leaving

    def __bool__(self) -> bool:
        return bool(self._leaving or self.dead)

    def add(self, record: Record, copy: StoredCopy) -> None:
        """Note that a record's bytes are on their way to `copy`."""
        record.copy = copy
        self._leaving.append(record)
        self._leaving_bytes += record.nbytes

    def fits(self, nbytes: int, window_bytes: int) -> bool:
        """Whether `nbytes` more may be on their way at once; a single storage always may."""
        return not self._leaving_bytes or self._leaving_bytes + nbytes <= window_bytes

    def free_sent(self) -> bool:
        """Free the memory of sent storages. Returns whether any of them could not be written."""
        failed = False
        leaving, self._leaving, self._leaving_bytes = self._leaving, [], 0
        for record in leaving:
            copy = record.copy
            if copy is None:
                continue
            if copy.failed is not None:
                self.dead.append(record.remains())
                failed = True
            elif not copy.source_free:
                self.add(record, copy)
            elif not record.asked:
                record.let_go()
        return failed

    def release_dead(self) -> int:
        """Release room. Returns the bytes brought back ahead that are not needed any more."""
        ahead_bytes = 0
        for _ in range(len(self.dead)):
            dead = self.dead.popleft()
            ahead_bytes += dead.ahead_bytes
            dead.ahead_bytes = 0
            if dead.copy is not None and not dead.copy.release():
                self.dead.append(dead)
        return ahead_bytes
