"""A greedy scheduler for uneven plans: any rank per (chunk, micro-batch), any costs, a memory cap.

A free rank starts the best of its ready actions. A few rules for "best" are tried, and the shortest
result is kept. Backpressure makes every cap from the minimum up safe: a rank with k chunks admits
the forward of its i-th chunk (i = 1..k) only while its first j chunks keep fewer than cap - (k - j)
activations, for every j from i to k. So one place is always left for each later chunk. Activations
of the last chunk can always be freed, and by induction from the last chunk to the first all others
can.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import product
from math import inf
from typing import Protocol

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules.actions import Action, Op, Program


class _Turn(Enum):
    """The choice of a rank that could start a forward and a backward."""

    ALTERNATE = auto()
    """The kind that did not run last."""
    BACKWARD = auto()
    FORWARD = auto()


class _Forward(Enum):
    """The order of ready forwards; of ready backwards, the lowest chunk comes first."""

    DEEPEST = auto()
    """The latest chunk first."""
    LONGEST = auto()
    """The longest path to the end of the step first."""


class MessageCost(Protocol):
    """The cost of a message between two ranks."""

    def __call__(self, source: int, target: int, /) -> float:
        """The time from a send on rank `source` to its arrival on rank `target`."""
        ...


def list_schedule(
    chunks: int,
    micro_batches: Collection[int],
    owner_of: Callable[[int, int], int],
    cost: Callable[[Action], float],
    *,
    message_cost: float | MessageCost = 0.0,
    cap: Mapping[int, int] | int | None = None,
    split_backward: bool = False,
    all_rules: bool = True,
) -> dict[int, Program]:
    """The compute actions for a given assignment of work; `with_messages` completes them.

    Args:
        chunks: the number of chunks of the whole model.
        micro_batches: the ids of the step, in the order in which they should enter.
        owner_of: (chunk, micro-batch) -> the rank that computes it.
        cost: the time of each action F, B (or I and W); must be above 0.
        message_cost: the time from a send to its arrival, or a function of the two ranks.
        cap: the most chunk activations that a rank keeps until their B or W, for all ranks or by
            rank; None, or a rank left out, is no limit.
        split_backward: use I and W instead of B; W fills idle time. Chunk 0, whose input gradient
            is not needed, keeps whole backwards.
        all_rules: try all rules for the best action; otherwise only the one that wins most often.
    Returns:
        The program by rank, for every rank that owns an action.
    Raises:
        ScheduleError: a cap is below the number of chunks that its rank owns.
    """
    work = _Work.of(chunks, micro_batches, owner_of, cost, message_cost, cap, split_backward)
    best: _SchedulingPass | None = None
    for turn, forward in list(product(_Turn, _Forward))[: None if all_rules else 1]:
        run = _SchedulingPass(work, turn, forward)
        if run.finish(inf if best is None else best.makespan):
            best = run
    assert best is not None
    return {rank: tuple(state.program) for rank, state in best.ranks.items()}


@dataclass(frozen=True, slots=True)
class _Work:
    """The assignment, its costs, and the distance of each action from the end of the step."""

    chunks: int
    owner: Mapping[tuple[int, int], int]
    order: Mapping[int, int]
    """The position of each micro-batch in the given order."""
    cost: Callable[[Action], float]
    message_cost: float | MessageCost
    owned: Mapping[int, tuple[int, ...]]
    """The chunks of each rank, ascending."""
    caps: Mapping[int, int | None]
    split_backward: bool
    path: Mapping[tuple[int, int], float]
    """(chunk, micro-batch) -> time from its forward's start to its last backward's end."""

    @classmethod
    def of(
        cls,
        chunks: int,
        micro_batches: Collection[int],
        owner_of: Callable[[int, int], int],
        cost: Callable[[Action], float],
        message_cost: float | MessageCost,
        cap: Mapping[int, int] | int | None,
        split_backward: bool,
    ) -> _Work:
        owner = {(c, m): owner_of(c, m) for c in range(chunks) for m in micro_batches}
        owned: dict[int, set[int]] = {}
        for (chunk, _), rank in owner.items():
            owned.setdefault(rank, set()).add(chunk)
        caps = {rank: cap.get(rank) if isinstance(cap, Mapping) else cap for rank in owned}
        for rank, limit in caps.items():
            if limit is not None and limit < len(owned[rank]):
                raise ScheduleError(
                    f"rank {rank} computes {len(owned[rank])} chunks and may keep {limit} "
                    f"activations; it needs at least {len(owned[rank])}, one per chunk: raise the "
                    "cap or give the rank fewer chunks"
                )
        path: dict[tuple[int, int], float] = {}
        work = cls(
            chunks,
            owner,
            {m: place for place, m in enumerate(micro_batches)},
            cost,
            message_cost,
            {rank: tuple(sorted(held)) for rank, held in sorted(owned.items())},
            caps,
            split_backward,
            path,
        )
        for micro_batch in work.order:
            after = 0.0
            for chunk in range(chunks):
                after += work.cost(Action(work.backward(chunk), chunk, micro_batch))
                if chunk > 0:
                    after += work.latency(chunk, chunk - 1, micro_batch)
            for chunk in reversed(range(chunks)):
                after += work.cost(Action(Op.FORWARD, chunk, micro_batch))
                path[chunk, micro_batch] = after
                if chunk > 0:
                    after += work.latency(chunk - 1, chunk, micro_batch)
        return work

    def following(self, action: Action) -> Action | None:
        """The action of the same micro-batch that can run after `action`; None after the last."""
        chunk, micro_batch = action.chunk, action.micro_batch
        if action.op is Op.FORWARD:
            if chunk + 1 < self.chunks:
                return Action(Op.FORWARD, chunk + 1, micro_batch)
            return Action(self.backward(chunk), chunk, micro_batch)
        if action.op is Op.BACKWARD_WEIGHT or chunk == 0:
            return None
        return Action(self.backward(chunk - 1), chunk - 1, micro_batch)

    def backward(self, chunk: int) -> Op:
        return Op.BACKWARD_INPUT if self.split_backward and chunk > 0 else Op.BACKWARD

    def latency(self, chunk: int, neighbour: int, micro_batch: int) -> float:
        source, target = self.owner[chunk, micro_batch], self.owner[neighbour, micro_batch]
        if source == target:
            return 0.0
        if isinstance(self.message_cost, int | float):
            return self.message_cost
        return self.message_cost(source, target)

    def priority(self, forward: _Forward, action: Action) -> tuple[float, int, int]:
        """The priority of an action; a smaller one is sooner.

        Never equal for two actions of one kind.
        """
        chunk, place = action.chunk, self.order[action.micro_batch]
        if action.op is not Op.FORWARD:
            return (chunk, place, chunk)
        if forward is _Forward.DEEPEST:
            return (-chunk, place, chunk)
        return (-self.path[chunk, action.micro_batch], place, chunk)


_Ready = tuple[tuple[float, int, int], Action]


class _RankState:
    """The actions of one rank: done, kept, and ready to start."""

    def __init__(self, chunks: tuple[int, ...], cap: int | None, turn: _Turn) -> None:
        self.program: list[Action] = []
        self.busy = False
        self._turn = turn
        self._backwards: list[_Ready] = []
        self._forwards: list[list[_Ready]] = [[] for _ in chunks]
        self._weights: deque[Action] = deque()
        self._level = {chunk: level for level, chunk in enumerate(chunks)}
        self._live = [0] * len(chunks)
        self._cap = cap
        self._forward_next = True

    def offer(self, priority: tuple[float, int, int], action: Action) -> None:
        is_forward = action.op is Op.FORWARD
        queue = self._forwards[self._level[action.chunk]] if is_forward else self._backwards
        heapq.heappush(queue, (priority, action))

    def _admits(self, level: int) -> bool:
        if self._cap is None:
            return True
        kept = sum(self._live[:level])
        for upper in range(level, len(self._live)):
            kept += self._live[upper]
            if kept >= self._cap - (len(self._live) - 1 - upper):
                return False
        return True

    def start(self) -> Action | None:
        """The action that the rank starts now: the best that the cap admits, if any."""
        action = self._take()
        if action is None:
            return None
        self.busy = True
        self.program.append(action)
        self._forward_next = self._turn is not _Turn.BACKWARD
        if action.op is Op.FORWARD:
            self._live[self._level[action.chunk]] += 1
            self._forward_next = self._turn is _Turn.FORWARD
        return action

    def _take(self) -> Action | None:
        admitted = [q for level, q in enumerate(self._forwards) if q and self._admits(level)]
        if self._backwards and not (admitted and self._forward_next):
            return heapq.heappop(self._backwards)[1]
        if admitted:
            return heapq.heappop(min(admitted, key=lambda queue: queue[0][0]))[1]
        return self._weights.popleft() if self._weights else None

    def finished(self, action: Action) -> None:
        self.busy = False
        if action.op is Op.BACKWARD_INPUT:
            self._weights.append(Action(Op.BACKWARD_WEIGHT, action.chunk, action.micro_batch))
        elif action.op is not Op.FORWARD:
            self._live[self._level[action.chunk]] -= 1


class _SchedulingPass:
    """One pass of event-driven list scheduling under one pair of rules."""

    def __init__(self, work: _Work, turn: _Turn, forward: _Forward) -> None:
        self.ranks = {r: _RankState(held, work.caps[r], turn) for r, held in work.owned.items()}
        self.makespan = 0.0
        self._work = work
        self._forward = forward
        # Time, serial number (keeps the order of equal times that of their causes), rank, whether
        # the rank ends the action or may start it from now on, action.
        self._events: list[tuple[float, int, int, bool, Action]] = []
        self._serial = 0
        for micro_batch in work.order:
            self._add(0.0, work.owner[0, micro_batch], False, Action(Op.FORWARD, 0, micro_batch))

    def finish(self, limit: float) -> bool:
        """Run to the end; False if the end is no sooner than `limit`."""
        events, work = self._events, self._work
        while events:
            now = events[0][0]
            if now >= limit:
                return False
            touched: dict[int, None] = {}
            while events and events[0][0] == now:
                _, _, rank, is_end, action = heapq.heappop(events)
                touched[rank] = None
                if is_end:
                    self.makespan = now
                    self.ranks[rank].finished(action)
                else:
                    self.ranks[rank].offer(work.priority(self._forward, action), action)
            for rank in touched:
                if not self.ranks[rank].busy:
                    self._start(now, rank)
        return True

    def _start(self, now: float, rank: int) -> None:
        work, action = self._work, self.ranks[rank].start()
        if action is None:
            return
        end = now + work.cost(action)
        self._add(end, rank, True, action)
        following = work.following(action)
        if following is not None:
            target = work.owner[following.chunk, following.micro_batch]
            arrival = end + work.latency(action.chunk, following.chunk, action.micro_batch)
            self._add(arrival, target, False, following)

    def _add(self, time: float, rank: int, is_end: bool, action: Action) -> None:
        heapq.heappush(self._events, (time, self._serial, rank, is_end, action))
        self._serial += 1
