"""A corpus as one sequence of tokens, and the places where its documents begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class DocumentStarts:
    """The places in a stream where its documents begin."""

    positions: np.ndarray
    """int64[documents], ascending; the first is 0. It may be mapped from a file."""
    fingerprint: str
    """Hexadecimal: equal where the places are equal. Empty: that of the stream covers them."""
    unit: int = 1
    """The number by which `positions` count one token."""

    def within(self, start: int, stop: int) -> np.ndarray:
        """The places from token `start` to token `stop` - 1: int64[...]."""
        first, last = (int(place) for place in self.counts_before(np.array([start, stop])))
        return np.array(self.positions[first:last], dtype=np.int64) // self.unit

    def counts_before(self, tokens: np.ndarray) -> np.ndarray:
        """The number of documents that begin before each of some places: int64, as `tokens`."""
        return np.searchsorted(self.positions, tokens * self.unit)


class TokenStream(Protocol):
    """A corpus as one sequence of tokens, read by range."""

    @property
    def name(self) -> str:
        """The stream's name in messages: the key and the path."""
        ...

    @property
    def count(self) -> int:
        """Number of tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where the tokens are equal."""
        ...

    @property
    def documents(self) -> DocumentStarts:
        """The places where documents begin."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1: int64[stop - start]."""
        ...
