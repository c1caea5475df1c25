"""The amount of activations that a step sends: as much as compute hides. Pure.

SSDTrain (Wu et al. 2024, section 3.4) measures the write bandwidth and the forward time of a few
steps and then fixes what stays. Here every step is measured, so the amount follows a drive that
slows down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from holdfast.parallel.errors import ConfigError, number_fault

MIB = 1 << 20
BUSY = 0.9
"""The fraction of a phase's time that transfers may take."""
_WAITED = 0.01
"""The fraction of a step's time that may be spent waiting before the amount falls."""
_LEAST_WINDOW, _MOST_WINDOW = 16 * MIB, 512 * MIB


@dataclass(frozen=True, slots=True)
class Amount:
    """The amount that the next step sends."""

    share: float = 1.0
    """The share of the eligible bytes that is sent, in [0, 1]."""
    tail_bytes: int = 0
    """Bytes that stay at the end of a forward pass when its backward pass follows directly."""
    window_bytes: int = 64 * MIB
    """The most bytes on their way out at once."""

    @property
    def ahead_bytes(self) -> int:
        """The most bytes brought back ahead of their use: a part of the window."""
        return int(self.window_bytes * self.share)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of the share that the user allows."""

    least_share: float = 0.0
    """In [0, 1], and at most `most_share`."""
    most_share: float = 1.0

    def __post_init__(self) -> None:
        """Raise ConfigError for what is no share, or limits in the wrong order."""
        fault = number_fault("most_share", self.most_share, 0, 1, whole=False)
        fault = fault or number_fault(
            "least_share", self.least_share, 0, self.most_share, whole=False
        )
        if fault:
            raise ConfigError(fault)


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one step. Times are in seconds."""

    eligible_bytes: int
    """Bytes that could have been sent, sent or not."""
    forward_bytes: int
    """The most eligible bytes of one forward pass."""
    written_bytes: int
    read_bytes: int
    forward_s: float
    """Time in forward passes."""
    forward_busy_s: float
    """Time in forward passes during which transfers were under way."""
    backward_s: float
    """Time in backward passes."""
    backward_busy_s: float
    """Time in backward passes during which transfers were under way."""
    waited_s: float
    """Time that backward passes waited for storages on their way back."""


def next_amount(before: Amount, seen: Measured, bounds: Bounds) -> Amount:
    """The amount for the step after the one measured in `seen`. Pure.

    The share moves towards the one at which transfers take nine tenths of the time that hides them.
    Time that a backward pass waited hides nothing. It moves by at most half of itself, and falls
    when a backward pass had to wait. It never falls to nothing by itself: a drive that recovers
    must be noticed.
    """
    least = max(bounds.least_share, min(0.02, bounds.most_share))
    factor = 1.5
    if seen.written_bytes:
        busy = max(
            _ratio(seen.forward_busy_s, seen.forward_s),
            _ratio(seen.backward_busy_s, seen.backward_s - seen.waited_s),
        )
        factor = max(0.5, min(1.5, BUSY / busy)) if busy else 1.5
    if seen.waited_s > _WAITED * (seen.forward_s + seen.backward_s):
        factor = min(factor, 0.8)
    share = max(least, min(bounds.most_share, before.share * factor))
    window = window_of(seen.forward_bytes)
    return Amount(share, _tail(seen, window), window)


def window_of(forward_bytes: int) -> int:
    """The most bytes on their way at once, if a forward pass saves `forward_bytes` at most."""
    return max(_LEAST_WINDOW, min(_MOST_WINDOW, forward_bytes // 16))


def _tail(seen: Measured, window: int) -> int:
    """The bytes whose backward passes take as long as writing a window out and reading one back."""
    if not (seen.written_bytes and seen.forward_busy_s and seen.backward_s):
        return 0
    write_rate = seen.written_bytes / seen.forward_busy_s
    round_trip_s = window / write_rate
    if seen.read_bytes and seen.backward_busy_s:
        round_trip_s += window * seen.backward_busy_s / seen.read_bytes
    asked_rate = seen.eligible_bytes / seen.backward_s
    return min(int(asked_rate * round_trip_s), seen.forward_bytes // 4)


def _ratio(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return math.inf if part > 0 else 0.0


def drive_life_years(rated_bytes: float, bytes_per_s: float) -> float | None:
    """The years a drive lasts at this mean write rate; None without a rating or a rate.

    Args:
        rated_bytes: the bytes that the drive may be written in its life, by its data sheet; 0:
            unknown.
        bytes_per_s: the mean rate of writes.
    """
    if rated_bytes <= 0 or bytes_per_s <= 0:
        return None
    return rated_bytes / bytes_per_s / (365.25 * 86400)
