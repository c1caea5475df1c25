"""Slow ranks: each rank's own time by phase, compared with ranks of the same work. Pure.

A rank's own time is the time of a phase without waits for other ranks. So one slow rank is
distinguished from the others, which all wait for it. The time of computing is compared by the work
that was done in it: micro-batches, and the lengths of the documents in them, whichever rank
computed them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.parallel.plan import Plan
from holdfast.parallel.schedules import TIMED_PHASES, StepPhase

_PEERS = 3
"""Ranks of the same work that suffice for the usual time; with fewer, all ranks count."""
_LEAST_S = 0.002
"""A step that is longer by less than this, in seconds, is not slow."""
_LEAST = 1.2
"""A rank is counted as slower only if it takes this many times the usual time for its work."""
_WELL = 1.5
"""A rank that was slow is well again if its probe takes no more times the usual time: it is short,
so its time is less certain."""
_STEPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
"""How slow a rank may be said to be: few values, so that noise does not change a plan."""

Slowness = tuple[tuple[int, int], ...]
"""(rank, the hundredths of the usual time that it takes for the same work), of slow ranks."""


class RankTimes(NamedTuple):
    """What one rank did in the mean step since the last comparison."""

    phases: tuple[float, ...]
    """Own seconds of each of `TIMED_PHASES`."""
    work: float
    """The operations of the forward passes that it computed."""
    probe_s: float = 0.0
    """The time of a fixed computation, where ranks were asked for it (`wants_probe`)."""


TIMES = len(TIMED_PHASES) + 2
"""The numbers of `RankTimes`."""


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


def times_of(table: Sequence[Sequence[float]], ranks: Sequence[int]) -> dict[int, RankTimes]:
    """The times of ranks, from a table with a row of `TIMES` numbers for each."""
    return {
        rank: RankTimes(tuple(phases), work, probe_s)
        for rank, (*phases, work, probe_s) in zip(ranks, table, strict=True)
    }


def wants_probe(plan: Plan) -> bool:
    """Whether a rank was so slow that it computes nothing, so that only a probe tells its speed."""
    return any(plan.stage_replicas.find(rank) is None for rank, _ in plan.slowness)


def micro_batch_work(plan: Plan, rank: int, attended: float = 1.0) -> float:
    """The operations of a rank's forward passes for one micro-batch; 0 for a spare.

    A rank of a smaller stage replica has a larger share of each.

    Args:
        attended: the pairs of queries and keys in its documents, as a share of those in sequences
            that are one document each.
    """
    if plan.stage_replicas.find(rank) is None:
        return 0.0
    layers = [plan.layers[layer] for layer in plan.layers_at(rank)]
    whole = sum(layer.forward_flops for layer in layers)
    attention = sum(layer.attention_flops for layer in layers)
    return (whole - (1.0 - attended) * attention) / plan.mesh_of(rank).shards


def work_of(plan: Plan, rank: int) -> float:
    """The operations of a rank's forward passes in a step, by the plan; 0 for a spare."""
    at = plan.stage_replicas.find(rank)
    if at is None:
        return 0.0
    return micro_batch_work(plan, rank) * len(plan.micro_batches_of(at.pipeline, at.data))


def find_stragglers(plan: Plan, times: Mapping[int, RankTimes], factor: float) -> list[Straggler]:
    """The ranks above `factor` times the usual time of their work, slowest first."""
    found = []
    for rank, usual in _usual(plan, times).items():
        own_s, usual_s = sum(times[rank].phases), sum(usual)
        if own_s > factor * usual_s and own_s - usual_s > _LEAST_S:
            excess = [mine - theirs for mine, theirs in zip(times[rank].phases, usual, strict=True)]
            phase = TIMED_PHASES[excess.index(max(excess))]
            found.append(Straggler(rank, own_s, usual_s, phase))
    return sorted(found, key=lambda straggler: (-straggler.ratio, straggler.rank))


def slowness_of(plan: Plan, times: Mapping[int, RankTimes]) -> Slowness:
    """The ranks that compute more slowly than the median rank of their work does, ascending.

    One that computes nothing because it was slow is still so if its probe says it.
    """
    found = {
        rank: _level(own_s / usual[0])
        for rank, usual in _usual(plan, times).items()
        if (own_s := times[rank].phases[0]) - usual[0] > _LEAST_S and usual[0] > 0
    }
    probes = [own.probe_s for own in times.values() if own.work > 0 and own.probe_s > 0]
    for rank, before in plan.slowness:
        if plan.stage_replicas.find(rank) is None and rank in times:
            ratio = times[rank].probe_s / statistics.median(probes) if probes else 0.0
            found[rank] = max(before, _level(ratio)) if ratio > _WELL or not ratio else 0
    return tuple((rank, level) for rank, level in sorted(found.items()) if level)


def _level(ratio: float) -> int:
    """One of few values, in hundredths; 0: not slow."""
    if ratio <= _LEAST:
        return 0
    return round(100 * min(_STEPS, key=lambda step: abs(step - ratio)))


def usual_s(times: Mapping[int, RankTimes]) -> float:
    """The seconds that the median rank takes for an operation of a forward pass; 0: not known."""
    rates = [own.phases[0] / own.work for own in times.values() if own.work > 0]
    return statistics.median(rates) if rates else 0.0


def lasting(windows: Sequence[Slowness]) -> Slowness:
    """The ranks that were slow in two comparisons in a row, each as slow as it was at least."""
    if len(windows) < 2:
        return ()
    before, last = dict(windows[-2]), dict(windows[-1])
    return tuple((rank, min(slow, before[rank])) for rank, slow in last.items() if rank in before)


def _usual(plan: Plan, times: Mapping[int, RankTimes]) -> dict[int, tuple[float, ...]]:
    """By rank that computes, the times of the same work on the median of the other ranks."""
    planned = {rank: work_of(plan, rank) for rank in times}
    busy = [rank for rank in times if planned[rank] > 0 and times[rank].work > 0]
    found = {}
    for rank in busy:
        peers = [other for other in busy if other != rank and planned[other] == planned[rank]]
        if len(peers) < _PEERS:
            peers = [other for other in busy if other != rank]
        if not peers:
            continue
        found[rank] = tuple(
            statistics.median(
                times[other].phases[phase]
                * (
                    times[rank].work / times[other].work
                    if TIMED_PHASES[phase] == "compute"
                    else planned[rank] / planned[other]
                )
                for other in peers
            )
            for phase in range(len(TIMED_PHASES))
        )
    return found
