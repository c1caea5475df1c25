"""Micro-batches that ranks claim as they become free, so that a slow one computes fewer.

The micro-batches of all replicas are one list, and each rank claims the next of it when it has
ended one: self-scheduling (Tang and Yew 1986; OpenMP's
`schedule(dynamic)`), which here changes no bit, as sums are integers. A rank that has become slow
leaves the last ones to those that would end them earlier. Exact-mode safe; not for fast mode.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import NamedTuple

import torch

from holdfast.parallel.comm import Communicator, Groups
from holdfast.parallel.plan import Plan

_REMEMBERED = 64
"""The last micro-batches whose times tell what is usual for a rank."""
_POLL_S, _POLLS = 0.002, 64
"""The least time between two looks at what is left, and the looks in the time of a micro-batch."""
_FIRST_PATIENCE, _MOST_PATIENCE = 4, 64
_TOGETHER = 64
"""Replicas that share a list, at most: a longer one would ask the store for too much."""


class Shares(NamedTuple):
    """The micro-batches that replicas share in a step whose ranks claim."""

    listed: tuple[int, ...]
    """Those that replicas claim one after another; equal on all of them."""
    replicas: range
    """The replicas that do."""


def shares_of(plan: Plan, replica: int, only: frozenset[int] | None = None) -> Shares:
    """What a replica of a plan with one stage can claim: the plan's rows, side by side. Pure.

    Args:
        only: the micro-batches of the step; None: all.
    """
    first = replica // _TOGETHER * _TOGETHER
    replicas = range(first, min(first + _TOGETHER, plan.stage_replicas.replicas(0)))
    rows = [
        [n for n in plan.micro_batches_of(0, other) if only is None or n in only]
        for other in replicas
    ]
    longest = max(map(len, rows))
    listed = [row[place] for place in range(longest) for row in rows if place < len(row)]
    return Shares(tuple(listed), replicas)


def leaves_it(own_s: float, usual_s: float, left: int, others: int) -> bool:
    """Whether a rank leaves the rest to others, as it would end one later than they all. Pure.

    Args:
        own_s: the time that it takes for a micro-batch now; `usual_s`: that the others take.
        left: the micro-batches that are not claimed yet.
        others: the replicas that claim beside it.
    """
    if not others or own_s <= usual_s:
        return False
    # The others become free one after another, and begin the last one after so many of its times.
    return own_s > (left / others + 1) * usual_s


class _Pace:
    """How long micro-batches take one rank, and whether it is well. Local."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self.of_all_s = 0.0
        """The median time of all ranks for a micro-batch; 0: not known."""
        self._idle, self._patience = 0, _FIRST_PATIENCE
        """The last steps in which the rank was too slow to begin anything, and after how many of
        them it tries again."""

    def note(self, seconds: float) -> None:
        """Note the time of a micro-batch."""
        self._times.append(seconds)

    @property
    def own_s(self) -> float:
        """What a micro-batch takes now; 0: not known."""
        return self._times[-1] if self._times else 0.0

    @property
    def usual_s(self) -> float:
        """What micro-batches usually take the rank, or all ranks if that is less; 0: not known."""
        several = len(self._times) > 1
        usual_s = statistics.quantiles(self._times, n=4)[0] if several else self.own_s
        return min(usual_s, self.of_all_s or usual_s)

    def end_step(self, count: int) -> None:
        """End a step with so many micro-batches.

        A rank that was too slow to begin any tries again after some steps, and each time in vain
        waits for twice as many.
        """
        if count > 1:
            self._idle, self._patience = 0, _FIRST_PATIENCE
        elif count == 0:
            self._idle += 1
            if self._idle >= self._patience and self._times:
                self._times.append(self.usual_s)
                self._idle, self._patience = 0, min(2 * self._patience, _MOST_PATIENCE)


class Claims:
    """One rank's part in the claims of steps. Collective over its stage replica, if not said."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        groups: Groups,
        device: torch.device,
        *,
        clock: Callable[[], float] = monotonic,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        """No step is claimed yet. Local."""
        self._plan, self._groups, self._device = plan, groups, device
        self._clock, self._pause = clock, pause
        self._at = plan.stage_replicas.find(rank)
        self._steps = 0
        """The steps of this plan whose micro-batches were claimed; equal on all ranks."""
        self._shares = Shares((), range(0))
        self.pace = _Pace()
        """How long micro-batches take this rank."""

    def step(self, only: frozenset[int] | None = None) -> Iterator[int]:
        """The micro-batches of this rank in a step, each when it is to be computed.

        When it ends, all micro-batches of the step are claimed.

        Args:
            only: as of `shares_of`.
        Raises:
            DistError: the store is gone.
            PeerLost: a rank of this replica is gone.
        """
        if self._at is None:
            return
        self._shares = shares_of(self._plan, self._at.data, only)
        self._steps += 1
        listed, count = self._shares.listed, 0
        while True:
            self._wait_if_slow()
            place = self._agreed(lambda: self._taken(1)) - 1
            if place >= len(listed):
                break
            if place == 0 and self._steps > 2 and self._is_first:
                self._groups.forget_count(self._name(self._steps - 2))
            yield from self._timed(listed[place])
            count += 1
        self.pace.end_step(count)

    def is_last(self) -> bool:
        """Whether nothing is left to claim, so that the micro-batch under way is the last here."""
        return self._agreed(lambda: self._taken(0)) >= len(self._shares.listed)

    def _taken(self, more: int) -> int:
        """The micro-batches of the step that are claimed, with so many more."""
        return self._groups.count(self._name(self._steps), more)

    def _name(self, step: int) -> str:
        return f"claims/{self._shares.replicas.start}/{step}"

    @property
    def _is_first(self) -> bool:
        """Whether this rank speaks for its stage replica."""
        return self._groups.shards.index == 0

    def _timed(self, number: int) -> Iterator[int]:
        recorder = self._groups.recorder
        began, blocked_s = self._clock(), recorder.blocked_s
        yield number
        self.pace.note(self._clock() - began - (recorder.blocked_s - blocked_s))

    def _agreed(self, ask: Callable[[], int]) -> int:
        """What the first rank of the stage replica learns, on all of them."""
        shards: Communicator = self._groups.shards
        if shards.size == 1:
            return ask()
        told = torch.tensor([ask() if self._is_first else 0], device=self._device)
        shards.all_reduce(told).wait()
        return int(told)

    def _wait_if_slow(self) -> None:
        """Let the others claim the rest for as long as this rank would take for one itself."""
        own_s, usual_s = self.pace.own_s, self.pace.usual_s
        if not self._is_first or own_s <= usual_s:
            return
        others = len(self._shares.replicas) - 1
        began = self._clock()
        while self._clock() - began < own_s:
            left = len(self._shares.listed) - self._taken(0)
            if left <= 0 or not leaves_it(own_s, usual_s, left, others):
                break
            self._groups.signal.check()
            self._pause(max(_POLL_S, usual_s / _POLLS))
        self._groups.recorder.blocked_s += self._clock() - began
