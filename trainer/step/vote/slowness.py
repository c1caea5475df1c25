"""Slow ranks: each rank's own time by phase, compared with ranks of the same work. Pure.

A rank's own time is the time of a phase without waits for other ranks. So one slow rank is
distinguished from the others, which all wait for it. The time of computing is compared by the work
that was done in it: micro-batches, and the lengths of the documents in them, whichever rank
computed them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.parallel.plan import Plan, Slowness
from holdfast.parallel.schedules import TIMED_PHASES, StepPhase

_PEERS = 3
"""Ranks of the same work that suffice for the usual time; with fewer, all ranks count."""
_LEAST_S = 0.002
"""A step that is longer by less than this, in seconds, is not slow."""
_MANY = 8
"""Ranks of the same work whose waits tell which of them the others wait for."""
_EXCESS = 0.05
"""What the own time of such a rank exceeds the usual by, at least."""
_WAIT_MARGIN, _OWN_MARGIN = 3.0, 6.0
"""Median deviations below the usual wait, and standard errors above the usual own time."""
_LEAST = 1.2
"""A rank is counted as slower only if it takes this many times the usual time for its work."""
_WELL = 1.5
"""A rank that was slow is well again if its probe takes no more times the usual time: it is short,
so its time is less certain."""
_STEPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
"""How slow a rank may be said to be: few values, so that noise does not change a plan."""


class RankTimes(NamedTuple):
    """What one rank did in the mean step since the last comparison."""

    phases: tuple[float, ...]
    """Own seconds of each of `TIMED_PHASES`."""
    work: float
    """The operations of the forward passes that it computed."""
    probe_s: float = 0.0
    """The time of a fixed computation, where ranks were asked for it (`wants_probe`)."""
    noise_s: float = 0.0
    """The standard error of the own time of a step."""
    waited_s: float = 0.0
    """Seconds of waits for others."""


TIMES = len(TIMED_PHASES) + 4
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
        rank: RankTimes(tuple(row[: len(TIMED_PHASES)]), *row[len(TIMED_PHASES) :])
        for rank, row in zip(ranks, table, strict=True)
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


def with_loads(
    plan: Plan, times: Mapping[int, RankTimes], loads: Sequence[Sequence[int]]
) -> Mapping[int, RankTimes]:
    """The times with the work of ranks that have experts with more or fewer choices than others.

    Args:
        loads: by layer, the choices of each expert in a step; empty: there are no experts.
    """
    if not (plan.spreads_experts and loads):
        return times
    return {
        rank: own._replace(work=own.work + further_work(plan, rank, loads)) if own.work else own
        for rank, own in times.items()
    }


def further_work(plan: Plan, rank: int, loads: Sequence[Sequence[int]]) -> float:
    """The operations of a rank's experts in a step beyond those of an even load; may be negative.

    Args:
        loads: as of `with_loads`.
    """
    at = plan.stage_replicas.find(rank)
    if at is None:
        return 0.0
    team, teams = frozenset(plan.team_of_rank(rank)), len(plan.teams(at.pipeline))
    found = 0.0
    for layer in plan.layers_at(rank):
        experts = plan.experts_of(rank, layer)
        if not experts:
            continue
        table, hosts = plan.layers[layer].parameters[0], plan.hosts(layer)
        per_choice = 2.0 * sum(spec.elements for spec in table if spec.expert == 0)
        choices = loads[layer][: len(hosts)]
        own = sum(choices[e] / len(team.intersection(hosts[e])) for e in experts)
        found += per_choice * (own - sum(choices) / len(team)) / teams
    return found


def find_stragglers(plan: Plan, times: Mapping[int, RankTimes], factor: float) -> list[Straggler]:
    """The ranks above `factor` times the usual time of their work, and of many ranks those that the
    others wait for; slowest first.
    """
    usual = _usual(plan, times)
    found = []
    for rank in usual:
        straggler = _straggler(rank, times[rank].phases, usual[rank])
        if straggler.own_s > factor * straggler.usual_s:
            found.append(straggler)
    named = {straggler.rank for straggler in found}
    found += [slow for slow in others_wait_for(plan, times) if slow.rank not in named]
    slow = [one for one in found if one.own_s - one.usual_s > _LEAST_S]
    return sorted(slow, key=lambda straggler: (-straggler.ratio, straggler.rank))


def _straggler(rank: int, own: Sequence[float], usual: Sequence[float]) -> Straggler:
    excess = [mine - theirs for mine, theirs in zip(own, usual, strict=True)]
    return Straggler(rank, sum(own), sum(usual), TIMED_PHASES[excess.index(max(excess))])


def others_wait_for(plan: Plan, times: Mapping[int, RankTimes]) -> list[Straggler]:
    """The ranks that many others of the same work wait for, though they take little longer."""
    by_work: dict[float, list[int]] = defaultdict(list)
    for rank, own in times.items():
        if own.work:
            by_work[work_of(plan, rank)].append(rank)
    found = []
    for ranks in by_work.values():
        usual_work = statistics.median(times[rank].work for rank in ranks)
        own = {rank: _for_work(times[rank], usual_work) for rank in ranks}
        usual = [statistics.median(column) for column in zip(*own.values(), strict=True)]
        slow = waited_for(
            {rank: sum(phases) for rank, phases in own.items()},
            {rank: times[rank].noise_s for rank in ranks},
            {rank: times[rank].waited_s for rank in ranks},
        )
        found += [_straggler(rank, own[rank], usual) for rank in slow]
    return found


def _for_work(own: RankTimes, work: float) -> tuple[float, ...]:
    """The seconds of each phase that a rank would take with other work."""
    compute_s, *others = own.phases
    return (compute_s * work / own.work, *others)


def waited_for(
    own_s: Mapping[int, float], noise_s: Mapping[int, float], waited_s: Mapping[int, float]
) -> list[int]:
    """The ranks of the same work that the others wait for; empty with few ranks.

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
