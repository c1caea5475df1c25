"""Gradient codes: what each worker computes in a round, and when a job's gradient is complete.

A job is the gradient of one batch. Each round every worker computes a share of the batches, its
load; a straggler's results of a round are lost. A code has enough of them elsewhere: at once, by
repetition, or within the next rounds (Krishnan et al. 2023, sequential gradient coding). The latter
is for jobs that do not wait for each other, as of several models that train in turn.

Rounds and jobs count from 1; job t begins in round t and must be complete after round t + delay.
What has returned is bool[rounds so far, workers].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Returned = NDArray[np.bool_]


class Task(NamedTuple):
    """What a worker computes in a round, or a part of it."""

    job: int
    kind: Literal["chunk", "coded"]
    """"chunk": the gradient of one part of the batch, which is this worker's alone. "coded": a sum
    over the parts of a group, which other workers compute, too."""
    number: int
    """The part among the worker's own, or the group."""


class Code(Protocol):
    """A way to spread jobs over workers."""

    @property
    def workers(self) -> int: ...

    @property
    def delay(self) -> int:
        """The rounds after its own that a job may take."""
        ...

    @property
    def load(self) -> float:
        """The share of a batch that a worker computes in a round."""
        ...

    def work(self, returned: Returned) -> list[list[Task]]:
        """By worker, what it computes in the round after those that have returned."""
        ...

    def is_complete(self, job: int, returned: Returned) -> bool:
        """Whether a job's gradient follows from the results of its rounds so far."""
        ...

    def tolerates(self, returned: Returned) -> bool:
        """Whether the newest round may be left with what has returned.

        If so for each round, every job is complete in time.
        """
        ...


@dataclass(frozen=True, slots=True)
class Repetition:
    """Each part of the batch is computed by a group of workers; any of them is enough (GC-Rep).

    Tandon et al. 2017. The sum of a group is taken as it is, so integers stay exact: codes of other
    kinds divide by coefficients up to 1e5.
    """

    workers: int
    stragglers: int
    """How many may be late in a round, whichever they are; the groups have one worker more."""

    def __post_init__(self) -> None:
        if not 0 <= self.stragglers < self.workers or self.workers % (self.stragglers + 1):
            raise ValueError(
                f"{self.workers} workers are no groups of {self.stragglers + 1}: a group has one "
                "worker more than may be late, and all groups are equal"
            )

    @property
    def delay(self) -> int:
        return 0

    @property
    def load(self) -> float:
        return (self.stragglers + 1) / self.workers

    def work(self, returned: Returned) -> list[list[Task]]:
        size, job = self.stragglers + 1, len(returned) + 1
        return [[Task(job, "coded", worker // size)] for worker in range(self.workers)]

    def is_complete(self, job: int, returned: Returned) -> bool:
        groups = returned[job - 1].reshape(-1, self.stragglers + 1)
        return bool(groups.any(axis=1).all())

    def tolerates(self, returned: Returned) -> bool:
        return self.is_complete(len(returned), returned)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """A code of which any results but those of some stragglers are enough; its load is that of
    `Repetition`, and its coefficients are not exact (Tandon et al. 2017).
    """

    workers: int
    stragglers: int

    @property
    def delay(self) -> int:
        return 0

    @property
    def load(self) -> float:
        return (self.stragglers + 1) / self.workers

    def work(self, returned: Returned) -> list[list[Task]]:
        job = len(returned) + 1
        return [[Task(job, "coded", 0)] for _ in range(self.workers)]

    def is_complete(self, job: int, returned: Returned) -> bool:
        return int(returned[job - 1].sum()) >= self.workers - self.stragglers

    def tolerates(self, returned: Returned) -> bool:
        return self.is_complete(len(returned), returned)


@dataclass(frozen=True, slots=True)
class Bursts:
    """A pattern of stragglers: they are few within some rounds, and none is one for long."""

    longest: int
    """The rounds from the first to the last in which a worker may straggle, within a window."""
    window: int
    most: int
    """The workers that may straggle in some round of a window."""

    def has(self, returned: Returned) -> bool:
        """Whether the window that ends with the newest round keeps to the pattern."""
        late = ~returned[-self.window :]
        if int(late.any(axis=0).sum()) > self.most:
            return False
        ever = late.any(axis=0)
        first, last = late.argmax(axis=0), len(late) - 1 - late[::-1].argmax(axis=0)
        return bool((last - first < self.longest)[ever].all())


@dataclass(frozen=True, slots=True)
class SelectiveRepetition:
    """A gradient code for fewer stragglers, and what is still missing is done again (SR-SGC)."""

    workers: int
    bursts: Bursts

    def __post_init__(self) -> None:
        if self.bursts.window < 2 or (self.bursts.window - 1) % self.bursts.longest:
            raise ValueError(
                f"a window of {self.bursts.window} rounds for bursts of {self.bursts.longest}: it "
                "has one round more than some bursts"
            )

    @property
    def stragglers(self) -> int:
        """The missing results without which a job is complete."""
        span = self.bursts.window - 1 + self.bursts.longest
        return math.ceil(self.bursts.longest * self.bursts.most / span)

    @property
    def delay(self) -> int:
        return self.bursts.longest

    @property
    def load(self) -> float:
        return (self.stragglers + 1) / self.workers

    def work(self, returned: Returned) -> list[list[Task]]:
        number = len(returned) + 1
        again = self._again(number, returned)
        return [
            [Task(number - self.delay if again[worker] else number, "coded", 0)]
            for worker in range(self.workers)
        ]

    def is_complete(self, job: int, returned: Returned) -> bool:
        missing = self._missing(job, returned)
        if len(returned) >= job + self.delay:
            again = self._again(job + self.delay, returned)
            missing &= ~(again & returned[job + self.delay - 1])
        return int(missing.sum()) <= self.stragglers

    def tolerates(self, returned: Returned) -> bool:
        return self.bursts.has(returned)

    def _missing(self, job: int, returned: Returned) -> NDArray[np.bool_]:
        """The workers without a result for a job after its own round."""
        return ~returned[job - 1] | self._again(job, returned)

    def _again(self, number: int, returned: Returned) -> NDArray[np.bool_]:
        """The workers that do an earlier job again in a round."""
        again = np.zeros(self.workers, dtype=np.bool_)
        for earlier in range(1 + (number - 1) % self.delay, number, self.delay):
            missing = ~returned[earlier - 1] | again
            excess = max(0, int(missing.sum()) - self.stragglers)
            again = np.zeros(self.workers, dtype=np.bool_)
            again[np.flatnonzero(missing)[:excess]] = True
        return again


@dataclass(frozen=True, slots=True)
class Multiplexed:
    """Most of a batch is computed once, and again where it was lost; the rest is coded (M-SGC).

    In each round a worker has a small task for each of the last window - 1 + longest jobs. Those of
    the first window - 1 are parts of its own; in the others it does again what it still misses, or
    else sends its sum of a coded group.
    """

    workers: int
    bursts: Bursts

    def __post_init__(self) -> None:
        if not 0 < self.bursts.longest < self.bursts.window or self.bursts.most > self.workers:
            raise ValueError(
                f"bursts of {self.bursts.longest} in windows of {self.bursts.window} rounds, of "
                f"{self.bursts.most} among {self.workers} workers: bursts are shorter than the "
                "window, and no more workers straggle than there are"
            )

    @property
    def _own(self) -> int:
        """The parts of a batch that are a worker's alone."""
        return self.bursts.window - 1

    @property
    def delay(self) -> int:
        return self.bursts.window - 2 + self.bursts.longest

    @property
    def load(self) -> float:
        slots, own, most = self.delay + 1, self._own, self.bursts.most
        if most == self.workers:
            return slots / (self.workers * own)
        coded = self.bursts.longest + own * (most + 1)
        return (most + 1) * slots / (self.workers * coded)

    def work(self, returned: Returned) -> list[list[Task]]:
        number = len(returned) + 1
        tasks: list[list[Task]] = [[] for _ in range(self.workers)]
        for slot in range(self.delay + 1):
            job = number - slot
            if job < 1:
                break
            if slot < self._own:
                for own in tasks:
                    own.append(Task(job, "chunk", slot))
                continue
            missing, _ = self._state(job, number - 1, returned)
            for worker, own in enumerate(tasks):
                left = np.flatnonzero(missing[worker])
                chunk = Task(job, "chunk", int(left[0])) if len(left) else None
                own.append(chunk or Task(job, "coded", slot - self._own))
        return tasks

    def is_complete(self, job: int, returned: Returned) -> bool:
        missing, results = self._state(job, len(returned), returned)
        return not missing.any() and bool((results >= self.workers - self.bursts.most).all())

    def tolerates(self, returned: Returned) -> bool:
        return self.bursts.has(returned)

    def _state(
        self, job: int, last: int, returned: Returned
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """The own parts that workers miss, and the results of each coded group, after a round."""
        missing = np.ones((self.workers, self._own), dtype=np.bool_)
        results = np.zeros(self.bursts.longest, dtype=np.int64)
        for slot in range(min(self.delay, last - job) + 1):
            came = returned[job + slot - 1]
            if slot < self._own:
                missing[came, slot] = False
                continue
            lacks = missing.any(axis=1)
            results[slot - self._own] = int((came & ~lacks).sum())
            again = np.flatnonzero(came & lacks)
            missing[again, missing[again].argmax(axis=1)] = False
        return missing, results


def least_load(workers: int, bursts: Bursts) -> float:
    """A load below which no code is complete in the delay of `Multiplexed`."""
    slots = bursts.window - 1 + bursts.longest
    kept = bursts.window - 1 + bursts.longest * (1 - bursts.most / workers)
    return slots / (workers * kept)
