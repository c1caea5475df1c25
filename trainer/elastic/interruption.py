"""The reason for the end of this rank's generation, and waits that stop for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from holdfast.parallel.errors import PeerLost

_POLL_S = 0.002
_KEY_S = 60.0
"""Seconds that `await_word` waits for another rank of a new generation."""


class Interruption:
    """The first reason for the end of the generation, if it has ended. Shared between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        return self._reason

    def begin(self, reason: str) -> None:
        """End the generation; an earlier reason stays."""
        with self._lock:
            self._reason = self._reason or reason

    def clear(self) -> None:
        """Clear the reason, because a new generation will be agreed on."""
        with self._lock:
            self._reason = None

    def check(self) -> None:
        """Raise `PeerLost` if the generation has ended."""
        if self._reason is not None:
            raise PeerLost(f"the generation has ended: {self._reason}")


def await_word(
    store: Store,
    key: str,
    interruption: Interruption,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bytes:
    """Wait for the value of a key that another rank of this generation sets.

    Raises:
        PeerLost: the generation ended, or the key was not set within a minute.
    """
    deadline_s = clock() + _KEY_S
    while not store.check([key]):
        interruption.check()
        if clock() > deadline_s:
            raise PeerLost(f"no rank has given its {key} within {_KEY_S:g} s")
        sleep(_POLL_S)
    return store.get(key)
