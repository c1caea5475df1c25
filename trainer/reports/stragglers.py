"""The clock of a rank's own time by phase, and which slow ranks are to be reported."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from time import perf_counter

from holdfast.parallel.schedules import TIMED_PHASES
from holdfast.trainer.reports.slow_links import LinkClock
from holdfast.trainer.step import RankTimes, Straggler, Training, find_stragglers

_REMEMBERED = 1024
"""The newest steps that are compared at most, also where none ever are."""


class PhaseClock:
    """The own time of one rank by phase since the last comparison. Local."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._phases = [deque[float](maxlen=_REMEMBERED) for _ in TIMED_PHASES]
        """By phase, the own seconds of the newest steps."""
        self._work = deque[float](maxlen=_REMEMBERED)
        self._steps = 0
        self._mark = (0.0, 0.0)
        self._blocked_s = 0.0
        """What the recorder says at the begin of the first step."""
        self._suspected: frozenset[int] = frozenset()
        self._told: frozenset[int] = frozenset()
        self.links = LinkClock()

    def start(self, training: Training) -> None:
        """Begin a step."""
        self._mark = (self._clock(), training.groups.recorder.blocked_s)
        if not self._steps:
            self._blocked_s = training.groups.recorder.blocked_s
        self._steps += 1
        self.links.start(training)

    def end(self, training: Training, phase: int) -> None:
        """End a phase, given by its position in `TIMED_PHASES`; the next one begins."""
        now, blocked_s = self._clock(), training.groups.recorder.blocked_s
        own_s = max(0.0, now - self._mark[0] - (blocked_s - self._mark[1]))
        self._phases[phase].append(own_s)
        if TIMED_PHASES[phase] == "compute":
            self._work.append(training.work_done())
        self._mark = (now, blocked_s)

    def times(self, training: Training, probe_s: float = 0.0) -> RankTimes:
        """The mean step since the last call, up to the vote that tells it to all.

        Args:
            probe_s: as of `RankTimes`.
        """
        means = tuple(sum(own) / max(1, len(own)) for own in self._phases)
        own_s = [sum(phases) for phases in zip(*self._phases, strict=False)]
        noise_s = statistics.stdev(own_s) / len(own_s) ** 0.5 if len(own_s) > 1 else math.inf
        waited_s = (training.groups.recorder.blocked_s - self._blocked_s) / max(1, self._steps)
        work = sum(self._work) / max(1, len(self._work))
        for noted in (*self._phases, self._work):
            noted.clear()
        self._steps = 0
        return RankTimes(means, work, probe_s, noise_s, waited_s)

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
