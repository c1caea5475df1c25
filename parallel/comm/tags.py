"""The tags of messages: one range for each kind, so that two kinds are never confused.

A tag tells the messages between two ranks of one group apart. Within a kind, the sender and the
receiver number the messages alike, from 0.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class TagRange:
    """The tags of one kind of message: from `first` up to, not including, `stop`."""

    kind: str
    first: int
    stop: int

    def tag(self, number: int) -> int:
        """The tag of the kind's message with this number.

        Raises:
            ValueError: the range has no such number; messages of two kinds would be confused.
        """
        if not 0 <= number < self.stop - self.first:
            raise ValueError(
                f"message {number} of {self.kind}: there are tags for {self.stop - self.first} "
                "messages"
            )
        return self.first + number

    def wrapped(self, number: int) -> int:
        """The tag of a message with an unbounded number: the range is reused."""
        return self.first + number % (self.stop - self.first)


ACTIVATIONS: Final = TagRange("activations and their gradients", 0, 1 << 28)
REDUCTION: Final = TagRange("gradient sums on their way to owners", 1 << 28, 5 << 26)
STATE_TRANSFER: Final = TagRange("optimizer state after a change of ranks", 5 << 26, 3 << 27)
SHADOW_GRADIENTS: Final = TagRange("reduced gradients on their way to shadows", 3 << 27, 7 << 26)
BACKGROUND_TRANSFER: Final = TagRange("optimizer state beside steps", 7 << 26, 1 << 29)
GATHERING: Final = TagRange("updated parameters on their way to holders", 1 << 29, 5 << 27)
CONTRIBUTIONS: Final = TagRange("gradients on their way to keepers", 5 << 27, 3 << 28)
LAYERS: Final = TagRange("parameters on their way to their use", 3 << 28, 7 << 27)
COLLECTIVES: Final = TagRange("the parts of collectives", 1 << 30, (1 << 30) + (1 << 20))
HANDSHAKES: Final = TagRange(
    "handshakes of transports", (1 << 30) + (1 << 20), (1 << 30) + (2 << 20)
)
EXCHANGES: Final = TagRange(
    "what all members send each other", (1 << 30) + (2 << 20), (1 << 30) + (3 << 20)
)
TIMINGS: Final = TagRange(
    "how long messages took", (1 << 30) + (3 << 20), (1 << 30) + (3 << 20) + (1 << 10)
)
PROBES: Final = TagRange(
    "messages that try links", (1 << 30) + (3 << 20) + (1 << 10), (1 << 30) + (4 << 20)
)
BREAKING: Final = TagRange("a receive that ends a connection", (1 << 31) - 1, 1 << 31)

RANGES: Final = (
    ACTIVATIONS,
    REDUCTION,
    STATE_TRANSFER,
    SHADOW_GRADIENTS,
    BACKGROUND_TRANSFER,
    GATHERING,
    CONTRIBUTIONS,
    LAYERS,
    COLLECTIVES,
    HANDSHAKES,
    EXCHANGES,
    TIMINGS,
    PROBES,
    BREAKING,
)
"""Every kind in use; tests/parallel/comm/test_tags.py checks that no two share a tag."""


_ASCENDING: Final = sorted(RANGES, key=lambda found: found.first)
_FIRSTS: Final = [found.first for found in _ASCENDING]
_BULK: Final = frozenset((REDUCTION, SHADOW_GRADIENTS, GATHERING, CONTRIBUTIONS, LAYERS, EXCHANGES))
_NAMED: Final = frozenset(RANGES[: RANGES.index(COLLECTIVES)])


def is_bulk(tag: int) -> bool:
    """Whether messages of a tag's kind fill a link in both directions at once. Pure."""
    return _range_of(tag) in _BULK


def kind_of(tag: int) -> str:
    """The kind of message of a tag; empty for the parts of collectives and of transports. Pure."""
    found = _range_of(tag)
    return found.kind if found is not None and found in _NAMED else ""


def _range_of(tag: int) -> TagRange | None:
    found = _ASCENDING[bisect_right(_FIRSTS, tag) - 1]
    return found if found.first <= tag < found.stop else None
