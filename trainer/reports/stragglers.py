"""Slow ranks: every rank's own time by phase, compared with ranks of the same work.

A rank's own time is the time of a phase without waits for other ranks. So one slow rank is
distinguished from the others, which all wait for it. Slow ranks are reported; nothing else is done
about them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from holdfast.parallel.plan import Plan
from holdfast.parallel.schedules import TIMED_PHASES, StepPhase
from holdfast.trainer.step import Training

_PEERS = 3
"""Ranks of the same work that suffice for the usual time; with fewer, all ranks count."""
_LEAST_S = 0.002
"""A step that is longer by less than this, in seconds, is not slow."""


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


class PhaseClock:
    """The own time of one rank by phase, and the slow ranks. Local but for `compare`."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._sums = [0.0] * len(TIMED_PHASES)
        self._steps = 0
        self._mark = (0.0, 0.0)
        self._suspected: frozenset[int] = frozenset()
        self._told: frozenset[int] = frozenset()

    def start(self, training: Training) -> None:
        """Begin a step."""
        self._mark = (self._clock(), training.groups.recorder.blocked_s)
        self._steps += 1

    def end(self, training: Training, phase: int) -> None:
        """End a phase, given by its position in `TIMED_PHASES`; the next one begins."""
        now, blocked_s = self._clock(), training.groups.recorder.blocked_s
        self._sums[phase] += max(0.0, now - self._mark[0] - (blocked_s - self._mark[1]))
        self._mark = (now, blocked_s)

    def compare(self, training: Training, factor: float) -> list[Straggler]:
        """Compare all ranks since the last comparison. Collective over all ranks.

        Returns:
            The ranks that were slow in two comparisons in a row and were not reported before; equal
            on every rank that took part in both.
        """
        ranks = training.plan.stage_replicas.ranks
        matrix = torch.zeros(len(ranks), len(TIMED_PHASES), dtype=torch.float64)
        steps = max(1, self._steps)
        matrix[ranks.index(training.rank)] = torch.tensor([s / steps for s in self._sums])
        self._sums, self._steps = [0.0] * len(TIMED_PHASES), 0
        training.groups.control.all_reduce(matrix).wait()
        times = dict(zip(ranks, matrix.tolist(), strict=True))
        slow = find_stragglers(training.plan, times, factor)
        again = frozenset(s.rank for s in slow) & self._suspected
        news = [s for s in slow if s.rank in again - self._told]
        self._suspected = frozenset(s.rank for s in slow)
        self._told = again | (self._told & self._suspected)
        return news
