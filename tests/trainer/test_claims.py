"""Claims of micro-batches: each is computed once, whoever is slow, and the step ends soon."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from holdfast.parallel.layout.mesh import Mesh
from holdfast.parallel.plan.initial import make_plan
from holdfast.parallel.plan.plan import Plan
from holdfast.trainer.step.micro_batches.claims import Claims, leaves_it, shares_of
from support.runs.plans import small_layers


def plan_of(data: int, micro_batches: int) -> Plan:
    return make_plan(
        small_layers(2, 1),
        Mesh.of(data=data),
        virtual=1,
        schedule="1f1b",
        micro_batches=micro_batches,
        block_elements=2000,
    )


class SimulatedClock:
    """The time of several threads, of which one runs at a time: the one that is due first."""

    def __init__(self, threads: int) -> None:
        self.now = 0.0
        self._turns = [threading.Semaphore(0) for _ in range(threads)]
        self._due: list[tuple[float, int]] = [(0.0, number) for number in range(threads)]

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run a part in each thread to its end."""
        threads = [
            threading.Thread(target=self._run, args=(number, part), daemon=True)
            for number, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join(30.0)
            assert not thread.is_alive()

    def _run(self, number: int, part: Callable[[], None]) -> None:
        self._turns[number].acquire()
        part()
        self._pass_on()

    def _pass_on(self) -> None:
        if self._due:
            self.now, number = heapq.heappop(self._due)
            self._turns[number].release()

    def wait(self, number: int, seconds: float) -> None:
        """Have a thread go on at a later time."""
        heapq.heappush(self._due, (self.now + seconds, number))
        self._pass_on()
        self._turns[number].acquire()


def simulated(
    micro_batches: int, steps: Sequence[Sequence[float]]
) -> list[tuple[float, list[list[int]]]]:
    """Steps of ranks that claim: the time of each step, and what each rank computed in it.

    Args:
        steps: of each step, the seconds of a micro-batch on each rank.
    """
    plan, ranks = plan_of(len(steps[0]), micro_batches), range(len(steps[0]))
    counters = Counter[str]()

    def count(name: str, amount: int) -> int:
        counters[name] += amount
        return counters[name]

    clock = SimulatedClock(len(ranks))
    shards = SimpleNamespace(size=1, index=0)
    signal = SimpleNamespace(check=lambda: None)
    parts = []
    for rank in ranks:
        groups: Any = SimpleNamespace(
            shards=shards,
            signal=signal,
            recorder=SimpleNamespace(blocked_s=0.0),
            count=count,
            forget_count=counters.__delitem__,
        )
        parts.append(
            Claims(
                plan,
                rank,
                groups,
                torch.device("cpu"),
                clock=lambda: clock.now,
                pause=lambda seconds, rank=rank: clock.wait(rank, seconds),
            )
        )
    found = []
    for times in steps:
        began, done = clock.now, [list[int]() for _ in ranks]

        def compute(rank: int, times: Sequence[float] = times, done: Any = done) -> None:
            for number in parts[rank].step():
                clock.wait(rank, times[rank])
                done[rank].append(number)

        clock._due = [(clock.now, rank) for rank in ranks]
        clock.run([lambda rank=rank: compute(rank) for rank in ranks])
        found.append((clock.now - began, done))
    assert len(counters) <= 2, "counters of steps that are over stay in the store"
    return found


@given(
    st.integers(1, 6),
    st.integers(1, 30),
    st.lists(st.lists(st.sampled_from([1.0, 3.0, 20.0]), min_size=6, max_size=6), min_size=1),
)
@settings(max_examples=25, deadline=None)
def test_every_micro_batch_is_computed_once_whoever_is_slow(
    ranks: int, micro_batches: int, times: list[list[float]]
) -> None:
    if micro_batches < ranks:
        return
    for _, done in simulated(micro_batches, [row[:ranks] for row in times]):
        assert sorted(itertools.chain(*done)) == list(range(micro_batches))


def test_a_step_with_a_slow_rank_takes_no_longer_where_there_is_a_rank_to_spare() -> None:
    healthy, slow = [1.0] * 9, [1.0] * 4 + [3.0] + [1.0] * 4
    found = simulated(64, [healthy] * 3 + [slow] * 20 + [healthy] * 3)
    times = [seconds for seconds, _ in found]
    assert times[:3] == pytest.approx([8.0] * 3)  # 64 of 9 ranks: some have 8, some 7
    # In the step in which it becomes slow it may have begun one too many.
    assert max(times[3:]) <= 9.0
    assert max(times[4:]) <= 8.0 + 0.1  # it looks again and again whether to wait any longer


def test_a_rank_that_is_very_slow_computes_nothing_but_is_tried_again() -> None:
    healthy, slow = [1.0] * 5, [1.0] * 4 + [40.0]
    found = simulated(20, [healthy] * 2 + [slow] * 40 + [healthy] * 70)
    counts = [len(done[4]) for _, done in found]
    assert counts[:2] == [4, 4]
    tried = [step for step, count in enumerate(counts[2:42]) if count]
    assert tried[0] == 0
    assert 2 <= len(tried) <= 5, tried  # with longer and longer pauses
    assert counts[-1] == 4, "it is well again, and left out still"


def test_who_leaves_a_micro_batch_to_others() -> None:
    assert not leaves_it(1.0, 1.0, 0, 3)
    assert not leaves_it(3.0, 1.0, 9, 0), "there are no others"
    assert not leaves_it(3.0, 1.0, 6, 3), "the others take 3 s for the rest"
    assert leaves_it(3.0, 1.0, 5, 3)


def test_a_list_has_every_micro_batch_of_up_to_64_replicas() -> None:
    plan = plan_of(100, 250)
    first, second = shares_of(plan, 63), shares_of(plan, 64)
    assert (first.replicas, second.replicas) == (range(64), range(64, 100))
    assert sorted((*first.listed, *second.listed)) == list(range(250))
    assert shares_of(plan, 0, frozenset(range(7))).listed == (0, 3, 6, 1, 4, 2, 5)
