"""What the offloader asks of the places where activations wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Since the store was opened."""

    written_bytes: int = 0
    read_bytes: int = 0
    busy_s: float = 0.0
    """In which transfers were under way."""
    room_bytes: int = 0
    """That the store takes on its drive, or in host memory."""
    used_bytes: int = 0
    """Of these, what is taken by activations now."""


class StoredCopy(Protocol):
    """One storage's bytes on their way out, away, or on their way back. Local."""

    nbytes: int
    failed: OSError | None
    """Why they could not be written; their source is then still whole."""

    @property
    def source_free(self) -> bool:
        """Whether the memory that they came from is needed no more."""
        ...

    def fetch(self) -> bool:
        """Begin to bring them back; False when there is no room for it now. Again is harmless."""
        ...

    def take(self) -> Tensor:
        """The bytes, uint8[nbytes], on the device that they came from and equally aligned; waits.

        Raises:
            OffloadError: they cannot be read.
        """
        ...

    def release(self) -> bool:
        """Give their room back; False while a transfer still needs it: ask again later."""
        ...


class Store(Protocol):
    """A place for storages. Local; used by one thread at a time."""

    @property
    def fault(self) -> str:
        """Why it takes nothing more, or less than it could; empty while all is well."""
        ...

    def put(self, source: Tensor) -> StoredCopy | None:
        """Begin to copy uint8[nbytes]; None when there is no room. The source must not change."""
        ...

    def advance(self) -> None:
        """Take the next steps of all that is under way, where they need no waiting."""
        ...

    def trim(self) -> None:
        """A step has ended: give memory back that it had no use for."""
        ...

    def statistics(self) -> StoreStatistics: ...

    def close(self) -> None:
        """End all transfers and give everything back; again is harmless."""
        ...
