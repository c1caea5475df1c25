"""Slow ranks: every rank's own time by phase, compared with ranks of the same work.

A rank's own time is the time of a phase without waits for other ranks. So one slow rank is
distinguished from the others, which all wait for it. Among many ranks of the same work one that is
slower by a few percent is found, too: it waits least. Slow ranks are reported; nothing else is done
about them.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from holdfast.parallel.plan import Plan
from holdfast.parallel.schedules import TIMED_PHASES, StepPhase
from holdfast.trainer.reports.slow_links import LinkClock
from holdfast.trainer.step import Training

_PEERS = 3
"""Ranks of the same work that suffice for the usual time; with fewer, all ranks count."""
_LEAST_S = 0.002
"""A step that is longer by less than this, in seconds, is not slow."""


_PHASES = range(len(TIMED_PHASES))
_MANY = 8
"""Ranks of the same work whose waits tell which of them the others wait for."""
_EXCESS = 0.05
"""What the own time of such a rank exceeds the usual by, at least."""
_WAIT_MARGIN, _OWN_MARGIN = 3.0, 6.0
"""Median deviations below the usual wait, and standard errors above the usual own time."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that takes longer than others for its work. Mean seconds of a step."""

    rank: int
    own_s: float
    usual_s: float
    """The time of the same work on the median rank."""
    phase: StepPhase
    """The phase with most of the difference."""

    @property
    def ratio(self) -> float:
        return self.own_s / self.usual_s if self.usual_s > 0 else float("inf")


def work_of(plan: Plan, rank: int) -> float:
    """The floating-point operations of a rank's forward passes in a step; 0 for a spare. Pure.

    A rank of a smaller stage replica has a larger share of each.
    """
    at = plan.stage_replicas.find(rank)
    if at is None:
        return 0.0
    flops = sum(plan.layers[layer].forward_flops for layer in plan.layers_at(rank))
    count = len(plan.micro_batches_of(at.pipeline, at.data))
    return flops * count / plan.mesh_of(rank).shards


def find_stragglers(
    plan: Plan, times: Mapping[int, Sequence[float]], factor: float
) -> list[Straggler]:
    """The ranks above `factor` times the usual time of their work, slowest first. Pure.

    Args:
        times: by rank, the seconds of each of `TIMED_PHASES` in a step.
    """
    work = {rank: work_of(plan, rank) for rank in times}
    busy = [rank for rank in times if work[rank] > 0]
    found = []
    for rank in busy:
        peers = [other for other in busy if other != rank and work[other] == work[rank]]
        if len(peers) < _PEERS:
            peers = [other for other in busy if other != rank]
        if not peers:
            continue
        usual = [
            statistics.median(times[other][phase] * work[rank] / work[other] for other in peers)
            for phase in range(len(TIMED_PHASES))
        ]
        own_s, usual_s = sum(times[rank]), sum(usual)
        if own_s > factor * usual_s and own_s - usual_s > _LEAST_S:
            excess = [mine - theirs for mine, theirs in zip(times[rank], usual, strict=True)]
            phase = TIMED_PHASES[excess.index(max(excess))]
            found.append(Straggler(rank, own_s, usual_s, phase))
    return sorted(found, key=lambda straggler: (-straggler.ratio, straggler.rank))


def waited_for(
    own_s: Mapping[int, float], noise_s: Mapping[int, float], waited_s: Mapping[int, float]
) -> list[int]:
    """The ranks of the same work that the others wait for; empty with few ranks. Pure.

    A rank that others wait for waits least (Dong et al. 2024). That its own time is longer, by more
    than noise explains, tells it apart from ranks that wait little for another reason.

    Args:
        own_s: by rank, the mean seconds of a step that it worked.
        noise_s: by rank, the standard error of that.
        waited_s: by rank, the seconds that it waited for others.
    """
    if len(own_s) < _MANY:
        return []
    usual_s, usual_wait_s = statistics.median(own_s.values()), statistics.median(waited_s.values())
    wait_deviation_s = statistics.median(abs(each - usual_wait_s) for each in waited_s.values())
    least_s = max(_EXCESS * usual_s, _OWN_MARGIN * statistics.median(noise_s.values()))
    return [
        rank
        for rank in own_s
        if waited_s[rank] < usual_wait_s - _WAIT_MARGIN * wait_deviation_s
        and own_s[rank] - usual_s >= least_s
    ]


class PhaseClock:
    """The own time of one rank by phase, and the slow ranks. Local but for `compare`."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._sums = [0.0] * len(TIMED_PHASES)
        self._steps: list[float] = []
        """The own seconds of each step."""
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
        self._steps.append(0.0)
        self.links.start(training)

    def end(self, training: Training, phase: int) -> None:
        """End a phase, given by its position in `TIMED_PHASES`; the next one begins."""
        now, blocked_s = self._clock(), training.groups.recorder.blocked_s
        own_s = max(0.0, now - self._mark[0] - (blocked_s - self._mark[1]))
        self._sums[phase] += own_s
        self._steps[-1] += own_s
        self._mark = (now, blocked_s)

    def compare(self, training: Training, factor: float) -> list[Straggler]:
        """Compare all ranks since the last comparison. Collective over all ranks.

        Returns:
            The ranks that were slow in two comparisons in a row and were not reported before; equal
            on every rank that took part in both.
        """
        ranks, plan = training.plan.stage_replicas.ranks, training.plan
        steps = max(1, len(self._steps))
        waited_s = (training.groups.recorder.blocked_s - self._blocked_s) / steps
        noise_s = statistics.stdev(self._steps) / steps**0.5 if steps > 1 else math.inf
        matrix = torch.zeros(len(ranks), len(TIMED_PHASES) + 2, dtype=torch.float64)
        matrix[ranks.index(training.rank)] = torch.tensor(
            [*(s / steps for s in self._sums), noise_s, waited_s]
        )
        self._sums, self._steps = [0.0] * len(TIMED_PHASES), []
        training.groups.control.all_reduce(matrix).wait()
        rows = dict(zip(ranks, matrix.tolist(), strict=True))
        times = {rank: row[:-2] for rank, row in rows.items()}
        slow = find_stragglers(plan, times, factor)
        found = {straggler.rank for straggler in slow}
        slow += [s for s in others_wait_for(plan, rows) if s.rank not in found]
        again = frozenset(s.rank for s in slow) & self._suspected
        news = [s for s in slow if s.rank in again - self._told]
        self._suspected = frozenset(s.rank for s in slow)
        self._told = again | (self._told & self._suspected)
        return news


def others_wait_for(plan: Plan, rows: Mapping[int, Sequence[float]]) -> list[Straggler]:
    """The ranks that others of the same work wait for, though they take little longer. Pure.

    Args:
        rows: by rank, its seconds by phase, the noise of their sum, and what it waited.
    """
    by_work: dict[float, list[int]] = defaultdict(list)
    for rank in rows:
        by_work[work_of(plan, rank)].append(rank)
    found = []
    for work, ranks in by_work.items():
        own_s = {rank: sum(rows[rank][:-2]) for rank in ranks}
        noise_s, waited_s = ({rank: rows[rank][at] for rank in ranks} for at in (-2, -1))
        for rank in waited_for(own_s, noise_s, waited_s) if work else ():
            usual = [statistics.median(rows[r][at] for r in ranks) for at in _PHASES]
            excess = [rows[rank][at] - usual[at] for at in _PHASES]
            phase = TIMED_PHASES[excess.index(max(excess))]
            usual_s = statistics.median(own_s.values())
            if own_s[rank] - usual_s > _LEAST_S:
                found.append(Straggler(rank, own_s[rank], usual_s, phase))
    return found
