"""The time that rounds take with a code, on given delays of workers.

The master waits until a multiple of the fastest worker's time, and goes on with what has returned,
if the code tolerates that; else it waits for all ("wait-out"), which counts in full.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.parallel.schedules.coding.codes import Code, Returned

Slowness = NDArray[np.float64]
"""float64[rounds, workers]: by how much a worker is slower than its load and fixed time say."""


@dataclass(frozen=True, slots=True)
class RoundTime:
    """The time that a worker takes for a round, without slowness."""

    fixed: float
    per_load: float

    def seconds(self, load: float) -> float:
        return self.fixed + self.per_load * load


def gilbert_elliott(
    draw: np.random.Generator, rounds: int, workers: int, begins: float, ends: float
) -> Slowness:
    """The slowness of workers that straggle in bursts (Gilbert 1960): 3 to 9 times as long.

    Args:
        begins, ends: the chance that a worker begins to straggle in a round, and that it ends to.
    """
    late = np.zeros((rounds, workers), dtype=np.bool_)
    late[0] = draw.random(workers) < begins / (begins + ends)
    for number in range(1, rounds):
        chance = draw.random(workers)
        late[number] = np.where(late[number - 1], chance >= ends, chance < begins)
    noise = draw.lognormal(0, 0.08, (rounds, workers))
    return noise * (1 + late * draw.uniform(2, 8, (rounds, workers)))


@dataclass(frozen=True, slots=True)
class CodedTime:
    """What a code took."""

    seconds: float
    waits: int
    """The rounds in which the master waited for all."""
    returned: Returned
    """What had returned of each round when the master went on."""


def coded_time(
    code: Code, slowness: Slowness, time: RoundTime, jobs: int, *, patience: float = 2.0
) -> CodedTime:
    """The time of jobs with a code.

    Args:
        slowness: of `jobs` + the code's delay rounds or more.
        patience: the multiple of the fastest worker's time for which the master waits.
    """
    rounds = jobs + code.delay
    returned = slowness[:rounds] <= patience * slowness[:rounds].min(axis=1, keepdims=True)
    spans, waits = np.empty(rounds), 0
    for number in range(rounds):
        if code.tolerates(returned[: number + 1]):
            is_whole = returned[number].all()
            fastest = slowness[number].min()
            spans[number] = slowness[number].max() if is_whole else patience * fastest
        else:
            returned[number], spans[number] = True, slowness[number].max()
            waits += 1
    return CodedTime(float(spans.sum()) * time.seconds(code.load), waits, returned)


def incomplete_jobs(code: Code, returned: Returned) -> list[int]:
    """The jobs that were not complete in time, of those whose rounds are over."""
    jobs = range(1, len(returned) - code.delay + 1)
    return [job for job in jobs if not code.is_complete(job, returned[: job + code.delay])]


def uncoded_time(slowness: Slowness, time: RoundTime, jobs: int) -> float:
    """The time of jobs without a code: each round waits for all."""
    workers = slowness.shape[1]
    return float(slowness[:jobs].max(axis=1).sum()) * time.seconds(1 / workers)


def speculative_time(
    slowness: Slowness, time: RoundTime, jobs: int, micro_batches: int, *, fixed_first: bool
) -> float:
    """The time of jobs whose micro-batches are taken over by workers that have ended their own.

    Such a worker takes the next micro-batch, not begun yet, of the worker that has most of them
    left. A job is complete once all micro-batches are, with no delay.

    Args:
        micro_batches: of each worker.
        fixed_first: whether a worker spends the fixed time before its first micro-batch; otherwise
            it is a part of each.
    """
    return sum(
        _speculative_round(slowness[number].tolist(), time, micro_batches, fixed_first=fixed_first)
        for number in range(jobs)
    )


def _speculative_round(
    slowness: list[float], time: RoundTime, micro_batches: int, *, fixed_first: bool
) -> float:
    workers = len(slowness)
    before, rest = (time.fixed, 0.0) if fixed_first else (0.0, time.fixed)
    each = (rest + time.per_load / workers) / micro_batches
    left = [micro_batches] * workers
    most = [(-micro_batches, worker) for worker in range(workers)]
    free = [(before * slow, worker) for worker, slow in enumerate(slowness)]
    heapq.heapify(most)
    heapq.heapify(free)
    ended = 0.0
    while free:
        now, worker = heapq.heappop(free)
        owner = worker
        if not left[worker]:
            while most and -most[0][0] != left[most[0][1]]:
                heapq.heappop(most)
            if not most or not left[most[0][1]]:
                continue
            owner = most[0][1]
        left[owner] -= 1
        heapq.heappush(most, (-left[owner], owner))
        now += each * slowness[worker]
        ended = max(ended, now)
        heapq.heappush(free, (now, worker))
    return ended
