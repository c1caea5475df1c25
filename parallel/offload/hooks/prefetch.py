"""Prefetch: brings storages back for the coming backward passes, in reverse order of saving."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable

from holdfast.parallel.offload.hooks.record import Record


class Scope:
    """The storages that one forward pass has saved, in order."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.complete = False
        self.nbytes = 0
        """The bytes that could have been sent out, sent or not."""
        self._records: list[weakref.ref[Record]] = []

    def add(self, record: Record) -> None:
        """Append a storage that this pass is the first to save."""
        record.scope, record.index = self, len(self._records)
        self._records.append(weakref.ref(record))
        self.nbytes += record.nbytes

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Record | None:
        """The storage at a position; None when no graph needs it any more."""
        return self._records[index]()


class Prefetch:
    """The position in the coming backward passes that prefetching has reached. Local."""

    def __init__(self, fetch: Callable[[Record], bool | None]) -> None:
        """Nothing is expected yet.

        Args:
            fetch: begins to bring a record back. Returns True when that was begun, None when
                nothing has to be done, False when there is no room for it now.
        """
        self._fetch = fetch
        self._scopes: dict[Hashable, Scope] = {}
        self._keys: list[Hashable] = []
        self._places: dict[Hashable, int] = {}
        self._scope: Scope | None = None
        self._next = -1
        self.ahead_bytes = 0
        """The bytes brought back or on their way back, and not asked for yet."""

    def expect(self, keys: Iterable[Hashable]) -> None:
        """Set the backward passes of a step, in their order; earlier ones are forgotten."""
        self._keys = list(keys)
        self._places = {key: place for place, key in enumerate(self._keys)}
        self._scopes.clear()
        self._scope = None

    def open(self, key: Hashable) -> Scope:
        """Begin a forward pass."""
        scope = self._scopes[key] = Scope(key)
        return scope

    def backward(self, key: Hashable) -> None:
        """Begin the backward pass of `key`."""
        scope = self._scopes.pop(key, None)
        if scope is not None and not self._is_past(scope):
            self._scope, self._next = scope, len(scope) - 1

    def asked(self, record: Record) -> None:
        """Note that a backward pass needs a record; the storages saved before it come next."""
        if record.ahead:
            record.ahead = False
            self.ahead_bytes -= record.nbytes
        scope = record.scope
        assert isinstance(scope, Scope)
        behind = scope is self._scope and self._next >= record.index
        if behind or not self._is_past(scope):
            self._scope, self._next = scope, record.index - 1

    def _is_past(self, scope: Scope) -> bool:
        """Whether the position is in this scope or in a later one."""
        if self._scope is None or scope is self._scope:
            return scope is self._scope
        here, there = self._places.get(self._scope.key), self._places.get(scope.key)
        return here is not None and there is not None and there < here

    def advance(self, window_bytes: int) -> None:
        """Bring back the next storages, up to `window_bytes` ahead of their use."""
        while self.ahead_bytes < window_bytes:
            if (self._scope is None or self._next < 0) and not self._enter_next():
                return
            assert self._scope is not None
            record = self._scope.record(self._next)
            if record is not None and not record.ahead:
                begun = self._fetch(record)
                if begun is False:
                    return
                if begun:
                    record.ahead = True
                    self.ahead_bytes += record.nbytes
            self._next -= 1

    def _enter_next(self) -> bool:
        """Go to the next backward pass if its forward pass is over."""
        place = -1
        if self._scope is not None:
            place = self._places.get(self._scope.key, len(self._keys))
        if place + 1 >= len(self._keys):
            return False
        following = self._scopes.get(self._keys[place + 1])
        if following is None or not following.complete:
            return False
        self._scope, self._next = following, len(following) - 1
        return len(following) > 0
