"""The clock of a rank's own time by phase, and which slow ranks are to be reported."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from holdfast.parallel.schedules import TIMED_PHASES
from holdfast.trainer.step import RankTimes, Straggler, Training, find_stragglers


class PhaseClock:
    """The own time of one rank by phase since the last comparison. Local."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._sums = [0.0] * len(TIMED_PHASES)
        self._counts = [0] * len(TIMED_PHASES)
        self._work = 0.0
        self._mark = (0.0, 0.0)
        self._suspected: frozenset[int] = frozenset()
        self._told: frozenset[int] = frozenset()

    def start(self, training: Training) -> None:
        """Begin a step."""
        self._mark = (self._clock(), training.groups.recorder.blocked_s)

    def end(self, training: Training, phase: int) -> None:
        """End a phase, given by its position in `TIMED_PHASES`; the next one begins."""
        now, blocked_s = self._clock(), training.groups.recorder.blocked_s
        self._sums[phase] += max(0.0, now - self._mark[0] - (blocked_s - self._mark[1]))
        self._counts[phase] += 1
        if TIMED_PHASES[phase] == "compute":
            self._work += training.work_done()
        self._mark = (now, blocked_s)

    def times(self, training: Training, probe_s: float = 0.0) -> RankTimes:
        """The mean step since the last call, up to the vote that tells it to all.

        Args:
            probe_s: as of `RankTimes`.
        """
        means = [s / max(1, n) for s, n in zip(self._sums, self._counts, strict=True)]
        work = self._work / max(1, self._counts[0])
        self._sums, self._counts = [0.0] * len(TIMED_PHASES), [0] * len(TIMED_PHASES)
        self._work = 0.0
        return RankTimes(tuple(means), work, probe_s)

    def compare(self, training: Training, factor: float) -> list[Straggler]:
        """The slow ranks to report after a step whose vote told the times of all ranks. Local.

        Returns:
            The ranks that were slow in two comparisons in a row and were not reported before; equal
            on every rank that took part in both.
        """
        slow = find_stragglers(training.plan, training.rank_times, factor)
        again = frozenset(s.rank for s in slow) & self._suspected
        news = [s for s in slow if s.rank in again - self._told]
        self._suspected = frozenset(s.rank for s in slow)
        self._told = again | (self._told & self._suspected)
        return news
