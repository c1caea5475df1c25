"""The protocol of an offload store: a place where activations wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Totals since the store was opened."""

    written_bytes: int = 0
    read_bytes: int = 0
    busy_s: float = 0.0
    """Seconds during which transfers were under way."""
    room_bytes: int = 0
    """Bytes that the store occupies on its drive or in host memory."""
    used_bytes: int = 0
    """The part of `room_bytes` that activations take now."""


class StoredCopy(Protocol):
    """The bytes of one storage on their way out, away, or on their way back. Local."""

    nbytes: int
    failed: OSError | None
    """The reason why the bytes could not be written; their source is then still whole."""

    @property
    def source_free(self) -> bool:
        """Whether the source's memory is needed no more."""
        ...

    def fetch(self) -> bool:
        """Begin to bring the bytes back; False when there is no room now. May be called again."""
        ...

    def take(self) -> Tensor:
        """Wait for the bytes: uint8[nbytes], on their own device and aligned as their source was.

        Raises:
            OffloadError: the bytes cannot be read.
        """
        ...

    def release(self) -> bool:
        """Release the room; False while a transfer still needs it: call again later."""
        ...


class Store(Protocol):
    """A place for storages. Local; used by one thread at a time."""

    @property
    def fault(self) -> str:
        """The reason why the store takes less than it could; empty while all is well."""
        ...

    def put(self, source: Tensor) -> StoredCopy | None:
        """Begin to copy uint8[nbytes]; None when there is no room. The source must not change."""
        ...

    def advance(self) -> None:
        """Advance all copies under way as far as that needs no waiting."""
        ...

    def trim(self) -> None:
        """End a step: release memory that the step had no use for."""
        ...

    def statistics(self) -> StoreStatistics: ...

    def close(self) -> None:
        """End all transfers and release everything. May be called again."""
        ...
