"""The members that an agreement still waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.elastic.agreement.reports import Report
from holdfast.elastic.generation import Identity

_LATE_SHARE = 0.8
"""The part of the limit of an agreement in which members may stay at work."""


class Attendance:
    """When an agreement has last heard of each member; it does not wait for those it misses."""

    def __init__(self, patience_s: float, limit_s: float, clock: Callable[[], float]) -> None:
        """Begin the agreement.

        Args:
            patience_s: how long a member may be missing from rounds.
            limit_s: the limit of the agreement, which comes to an end before it: members that are
                still at work then are left out, so that not all give up.
        """
        self._patience_s, self._clock = patience_s, clock
        self._late_s = _LATE_SHARE * limit_s
        self._since_s = clock()
        self._seen_s: dict[Identity, float] = {}
        self._agree: frozenset[Identity] = frozenset()

    def note(self, reports: Mapping[Identity, Report]) -> None:
        """Note the workers of a round: those that agree, and those that only say that they work."""
        self._seen_s.update(dict.fromkeys(reports, self._clock()))
        self._agree = frozenset(i for i, report in reports.items() if not report.settled)

    def begin_again(self) -> None:
        """Miss no member yet, as after a time in which this worker was cut off."""
        self._since_s = self._clock()
        self._seen_s.clear()

    def overdue(self, members: frozenset[Identity]) -> frozenset[Identity]:
        """The members that have been missing for too long."""
        now_s = self._clock()
        if now_s - self._since_s > self._late_s:
            return members - self._agree
        return frozenset(
            identity
            for identity in members
            if now_s - self._seen_s.get(identity, self._since_s) > self._patience_s
        )
