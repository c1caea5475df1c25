"""Why the generation of this rank has ended, and waits that heed it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from holdfast.parallel.errors import PeerLost

_POLL_S = 0.002
_KEY_S = 60.0
"""How long `await_word` waits for another rank of a new generation."""


class Interruption:
    """The first reason for which the generation ended, once it has. Shared between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        return self._reason

    def begin(self, reason: str) -> None:
        """The generation ends. A reason that is there already stays."""
        with self._lock:
            self._reason = self._reason or reason

    def clear(self) -> None:
        """A new generation is about to be agreed on."""
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
    """The value of a key that another rank of this generation sets.

    Raises:
        PeerLost: the generation has ended, or the key is not set within a minute.
    """
    deadline_s = clock() + _KEY_S
    while not store.check([key]):
        interruption.check()
        if clock() > deadline_s:
            raise PeerLost(f"no rank has given its {key} within {_KEY_S:g} s")
        sleep(_POLL_S)
    return store.get(key)
