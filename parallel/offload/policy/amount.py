"""How much of the activations a step sends out: as much as its drive hides under compute. Pure.

SSDTrain (Wu et al. 2024, section 3.4) measures the write bandwidth and the forward time of a few
steps and then fixes what stays. Here every step is measured, so that the amount follows a drive
that slows down.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
BUSY = 0.9
"""The part of a phase's time that transfers may take."""
_WAITED = 0.01
"""The part of a step's time that may be waited before the amount falls."""
_LEAST_WINDOW, _MOST_WINDOW = 16 * MIB, 512 * MIB


@dataclass(frozen=True, slots=True)
class Amount:
    """What the next step sends. Values."""

    share: float = 1.0
    """Of the bytes that could be sent, in [0, 1]."""
    tail_bytes: int = 0
    """What stays at the end of a forward pass whose backward pass follows at once."""
    window_bytes: int = 64 * MIB
    """The most that is on its way out at once."""

    @property
    def ahead_bytes(self) -> int:
        """The most brought back ahead of its use: the part of a window between what stays."""
        return int(self.window_bytes * self.share)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the user allows."""

    least_share: float = 0.0
    most_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one step took. Times in seconds."""

    eligible_bytes: int
    """That could have been sent, sent or not."""
    forward_bytes: int
    """Of these, the most of one forward pass."""
    written_bytes: int
    read_bytes: int
    forward_s: float
    """In forward passes, and in which of them transfers were under way."""
    forward_busy_s: float
    backward_s: float
    backward_busy_s: float
    waited_s: float
    """That backward passes stood still for what was not back yet."""


def next_amount(before: Amount, seen: Measured, bounds: Bounds) -> Amount:
    """What the step after the one that was `seen` sends. Pure.

    The share moves towards the one at which transfers take nine tenths of the time that hides them:
    by a half of itself at most, and downwards when a backward pass had to wait. It never falls to
    nothing by itself, or a drive that recovers would not be noticed.
    """
    least = max(bounds.least_share, min(0.02, bounds.most_share))
    factor = 1.5
    if seen.written_bytes:
        busy = max(
            _ratio(seen.forward_busy_s, seen.forward_s),
            _ratio(seen.backward_busy_s, seen.backward_s),
        )
        factor = max(0.5, min(1.5, BUSY / busy)) if busy else 1.5
    if seen.waited_s > _WAITED * (seen.forward_s + seen.backward_s):
        factor = min(factor, 0.8)
    share = max(least, min(bounds.most_share, before.share * factor))
    window = window_of(seen.forward_bytes)
    return Amount(share, _tail(seen, window), window)


def window_of(forward_bytes: int) -> int:
    """What may be on its way at once, for forward passes that save so many bytes at most."""
    return max(_LEAST_WINDOW, min(_MOST_WINDOW, forward_bytes // 16))


def _tail(seen: Measured, window: int) -> int:
    """The bytes whose backward passes last as long as writing out a window and reading one back."""
    if not (seen.written_bytes and seen.forward_busy_s and seen.backward_s):
        return 0
    write_rate = seen.written_bytes / seen.forward_busy_s
    round_trip_s = window / write_rate
    if seen.read_bytes and seen.backward_busy_s:
        round_trip_s += window * seen.backward_busy_s / seen.read_bytes
    asked_rate = seen.eligible_bytes / seen.backward_s
    return min(int(asked_rate * round_trip_s), seen.forward_bytes // 4)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def drive_life_years(rated_bytes: float, bytes_per_s: float) -> float | None:
    """How long a drive lasts at this mean rate of writes; None without a rating or a rate."""
    if rated_bytes <= 0 or bytes_per_s <= 0:
        return None
    return rated_bytes / bytes_per_s / (365.25 * 86400)
