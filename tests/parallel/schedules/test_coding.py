"""Gradient codes: every conforming pattern decodes, loads and times are those that are known."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict

import numpy as np
import pytest

from holdfast.parallel.schedules.coding.codes import (
    AnyOf,
    Bursts,
    Code,
    Multiplexed,
    Repetition,
    Returned,
    SelectiveRepetition,
    least_load,
)
from holdfast.parallel.schedules.coding.delays import (
    RoundTime,
    coded_time,
    gilbert_elliott,
    incomplete_jobs,
    speculative_time,
    uncoded_time,
)

SETTINGS = [
    (8, 2, 5, 5),
    (8, 1, 2, 3),
    (6, 1, 3, 6),
    (10, 2, 3, 4),
    (12, 3, 4, 5),
    (8, 3, 7, 2),
    (9, 2, 5, 8),
]
"""Workers, and the longest burst, the window and the most stragglers of patterns."""
DRAWS = 300
ROUNDS = 24
WORKERS, JOBS = 256, 480


def random_pattern(draw: random.Random, workers: int, bursts: Bursts) -> Returned:
    """What returns when as many straggle as the pattern lets, by its definition."""
    late: list[set[int]] = []
    share = draw.choice((0.1, 0.4, 0.9))
    for number in range(ROUNDS):
        recent = late[max(0, number - bursts.window + 1) :]
        allowed = set()
        for worker in draw.sample(range(workers), workers):
            known = set().union(*recent, allowed)
            began = [at for at, those in enumerate(recent) if worker in those]
            short = not began or len(recent) - began[0] < bursts.longest
            if short and len(known | {worker}) <= bursts.most and draw.random() < share:
                allowed.add(worker)
        late.append(allowed)
    return np.array([[worker not in those for worker in range(workers)] for those in late])


def decoded(code: Code, job: int, returned: Returned) -> bool:
    """Whether a job is complete, from the tasks that were given out and came back."""
    chunks: dict[int, set[int]] = defaultdict(set)
    coded: dict[int, set[int]] = defaultdict(set)
    for number in range(job, min(len(returned), job + code.delay) + 1):
        for worker, tasks in enumerate(code.work(returned[: number - 1])):
            for task in tasks:
                if task.job != job or not returned[number - 1, worker]:
                    continue
                if task.kind == "chunk":
                    chunks[worker].add(task.number)
                else:
                    coded[task.number].add(worker)
    match code:
        case Multiplexed(bursts=bursts):
            own = [len(chunks[worker]) == bursts.window - 1 for worker in range(code.workers)]
            least = code.workers - bursts.most
            return all(own) and all(len(coded[g]) >= least for g in range(bursts.longest))
        case Repetition(stragglers=late):
            return all(coded[group] for group in range(code.workers // (late + 1)))
        case SelectiveRepetition(stragglers=late) | AnyOf(stragglers=late):
            return len(coded[0]) >= code.workers - late
    raise AssertionError(code)


@pytest.mark.parametrize("kind", [SelectiveRepetition, Multiplexed])
@pytest.mark.parametrize(("workers", "longest", "window", "most"), SETTINGS)
def test_every_job_of_a_conforming_pattern_is_complete_in_time(
    kind: type[SelectiveRepetition | Multiplexed],
    workers: int,
    longest: int,
    window: int,
    most: int,
) -> None:
    bursts = Bursts(longest, window, most)
    code, draw = kind(workers, bursts), random.Random(workers)
    for _ in range(DRAWS):
        returned = random_pattern(draw, workers, bursts)
        assert all(code.tolerates(returned[:number]) for number in range(1, ROUNDS + 1))
        assert incomplete_jobs(code, returned) == []
        job = draw.randrange(1, ROUNDS - code.delay + 1)
        assert decoded(code, job, returned)


@pytest.mark.parametrize(
    "code",
    [
        Repetition(6, 2),
        AnyOf(6, 2),
        SelectiveRepetition(6, Bursts(1, 2, 2)),
        Multiplexed(6, Bursts(1, 2, 2)),
        Multiplexed(6, Bursts(2, 3, 6)),
    ],
)
def test_a_job_is_complete_when_the_results_of_its_tasks_say_so(code: Code) -> None:
    draw, seen = random.Random(1), set()
    for _ in range(DRAWS):
        share = draw.choice((0.3, 0.5, 0.9))
        returned = np.array([[draw.random() < share for _ in range(6)] for _ in range(8)])
        for job in range(1, 6):
            complete = code.is_complete(job, returned)
            assert complete == decoded(code, job, returned)
            seen.add(complete)
    assert seen == {True, False}


def test_a_burst_that_is_too_long_or_of_too_many_breaks_the_pattern() -> None:
    bursts = Bursts(2, 4, 2)
    lasts = np.ones((4, 5), dtype=bool)
    lasts[1:3, 0] = False
    assert bursts.has(lasts)
    lasts[1, 0], lasts[0, 0] = True, False
    assert not bursts.has(lasts), "its first and last round are three apart"
    many = np.ones((4, 5), dtype=bool)
    many[0, 0] = many[1, 1] = many[2, 2] = False
    assert not bursts.has(many)
    assert bursts.has(many[1:])


def test_loads_are_those_that_were_published() -> None:
    assert Multiplexed(WORKERS, Bursts(1, 2, 27)).load == pytest.approx(0.00754, abs=1e-5)
    selective = SelectiveRepetition(WORKERS, Bursts(2, 3, 23))
    assert (selective.stragglers, round(selective.load, 4)) == (12, 0.0508)
    assert AnyOf(WORKERS, 15).load == Repetition(WORKERS, 15).load == 0.0625
    bursts = Bursts(2, 5, 5)
    assert Multiplexed(8, bursts).load == pytest.approx(0.173, abs=1e-3)
    assert least_load(8, bursts) == pytest.approx(0.158, abs=1e-3)
    assert SelectiveRepetition(8, bursts).load == 0.375
    assert AnyOf(8, 5).load == 0.75
    for most in (7, 8):
        full = Bursts(2, 5, most)
        assert Multiplexed(8, full).load == pytest.approx(least_load(8, full))


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no groups of 3"):
        Repetition(8, 2)
    with pytest.raises(ValueError, match="one round more than some bursts"):
        SelectiveRepetition(8, Bursts(2, 4, 3))
    with pytest.raises(ValueError, match="shorter than the window"):
        Multiplexed(8, Bursts(2, 2, 3))


class Strict(AnyOf):
    """The code that the authors of sequential codes compared with waits for one worker more."""

    def tolerates(self, returned: Returned) -> bool:
        late = int((~returned[-1]).sum())
        return late < self.stragglers or not late


@pytest.mark.parametrize(
    ("begins", "ends", "per_load", "uncoded_s", "repeated_s", "late", "multiplexed_s", "bursts"),
    [
        (0.03, 0.995, 8, 2145, 797, 14, 501, Bursts(1, 2, 26)),
        (0.05, 0.995, 16, 2386, 1497, 20, 617, Bursts(1, 2, 38)),
        (0.03, 0.85, 16, 2317, 1291, 17, 1015, Bursts(2, 3, 34)),
        (0.045, 0.85, 16, 2401, 1538, 20, 1254, Bursts(2, 3, 46)),
    ],
)
def test_times_are_those_of_the_authors_code(
    begins: float,
    ends: float,
    per_load: float,
    uncoded_s: float,
    repeated_s: float,
    late: int,
    multiplexed_s: float,
    bursts: Bursts,
) -> None:
    time, multiplexed = RoundTime(0.5, per_load), Multiplexed(WORKERS, bursts)
    found = []
    for seed in range(3):
        slowness = gilbert_elliott(
            np.random.default_rng(seed), JOBS + multiplexed.delay, WORKERS, begins, ends
        )
        taken = coded_time(multiplexed, slowness, time, JOBS)
        assert incomplete_jobs(multiplexed, taken.returned) == []
        repeated = coded_time(Strict(WORKERS, late), slowness, time, JOBS)
        found.append((uncoded_time(slowness, time, JOBS), repeated.seconds, taken.seconds))
    means = [statistics.mean(column) for column in zip(*found, strict=True)]
    assert means == pytest.approx([uncoded_s, repeated_s, multiplexed_s], rel=0.06)


@pytest.mark.parametrize("ends", [0.85, 0.6])
def test_a_sequential_code_loses_where_bursts_are_long_and_the_fixed_time_is_large(
    ends: float,
) -> None:
    slowness = gilbert_elliott(np.random.default_rng(0), JOBS + 8, WORKERS, 0.03, ends)
    time = RoundTime(0.5, 8)
    sequential = min(
        coded_time(Multiplexed(WORKERS, Bursts(2, 3, most)), slowness, time, JOBS).seconds
        for most in range(26, 60, 8)
    )
    repeated = min(
        coded_time(AnyOf(WORKERS, late), slowness, time, JOBS).seconds for late in range(12, 24)
    )
    assert sequential > repeated


def test_what_breaks_the_pattern_is_waited_for_in_full() -> None:
    slowness = np.ones((3, 4))
    slowness[1, :2] = 5.0
    taken = coded_time(AnyOf(4, 1), slowness, RoundTime(0.0, 1.0), 3)
    assert (taken.waits, taken.seconds) == (1, pytest.approx((1 + 5 + 1) / 2))
    assert taken.returned.all()
    late = coded_time(AnyOf(4, 2), slowness, RoundTime(0.0, 1.0), 3)
    assert (late.waits, late.seconds) == (0, pytest.approx((1 + 2 + 1) * 0.75))


def test_micro_batches_of_a_slow_worker_are_taken_over() -> None:
    slowness = np.ones((1, 2))
    slowness[0, 1] = 10.0
    time = RoundTime(0.0, 2.0)
    assert uncoded_time(slowness, time, 1) == 10.0
    # The slow worker is at its first of four; the other does its own four and three more.
    assert speculative_time(slowness, time, 1, 4, fixed_first=False) == 2.5
    assert speculative_time(slowness, time, 1, 1, fixed_first=False) == 10.0
    # It has begun none while it prepares, so all eight are done by the other.
    prepared = RoundTime(1.0, 2.0)
    assert speculative_time(slowness, prepared, 1, 4, fixed_first=True) == 3.0
