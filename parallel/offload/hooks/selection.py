"""The selection of the saved storages that are sent. Pure but for its counters."""

from __future__ import annotations

from collections.abc import Hashable

from holdfast.parallel.offload.policy import Amount, Bounds, Measured, next_amount


class Selection:
    """Spreads the amount of a step evenly over the step's storages."""

    def __init__(self, bounds: Bounds) -> None:
        """The first step sends the largest share that `bounds` allow."""
        self.amount = Amount(share=bounds.most_share)
        """The amount that this step sends."""
        self._bounds = bounds
        self._credit = 0.0
        self._kind: Hashable = None
        self._at_once = True
        self._expected: dict[Hashable, int] = {}
        """The eligible bytes of a forward pass, by its kind."""

    def open(self, kind: Hashable, *, at_once: bool) -> None:
        """Begin a forward pass; see `Offloader.forward`."""
        self._kind, self._at_once = kind, at_once

    def complete(self, kind: Hashable, nbytes: int) -> None:
        """End a forward pass of `kind`, which has saved `nbytes` eligible bytes."""
        self._expected[kind] = nbytes

    @property
    def largest_bytes(self) -> int:
        """The eligible bytes of the largest forward pass."""
        return max(self._expected.values(), default=0)

    def wants(self, nbytes: int, saved_bytes: int) -> bool:
        """Whether a storage of `nbytes` is sent. Asked once for each storage.

        Args:
            saved_bytes: the eligible bytes of the forward pass so far, this storage included.
        """
        stays_from = self._expected.get(self._kind, 0) - self.amount.tail_bytes
        if self._at_once and self._kind in self._expected and saved_bytes > stays_from:
            return False
        self._credit += nbytes * self.amount.share
        if self._credit < nbytes - 0.5:
            return False
        self._credit = min(self._credit - nbytes, nbytes)
        return True

    def adapt(self, used: Amount, seen: Measured) -> None:
        """Set the amount of the next step from the measurements of one that used `used`."""
        self.amount = next_amount(used, seen, self._bounds)
