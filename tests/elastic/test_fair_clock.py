"""The time that counts against a watched process."""

from __future__ import annotations

import os

import pytest

from holdfast.elastic.channel import USUAL_S, FairClock
from holdfast.launch.agent.liveness import silence
from support.processes.fake_clock import FakeClock


def look(clock: FakeClock, fair: FairClock, times: int, starved_s: float = 0.0) -> None:
    """The watcher looks so many times, every 0.1 s."""
    for _ in range(times):
        clock.now_s += 0.1
        fair.look(starved_s)


def test_a_watcher_that_was_itself_stopped_blames_no_other_for_that_time() -> None:
    clock = FakeClock()
    fair = FairClock(clock)
    look(clock, fair, 10)
    beat_s = clock()
    clock.now_s += 20.0  # the watcher was stopped, or had no processor
    fair.look()
    assert fair.since(beat_s) == pytest.approx(USUAL_S)
    look(clock, fair, 30)
    assert fair.since(beat_s) == pytest.approx(USUAL_S + 3.0)
    assert fair.since(clock() - 2.0) == pytest.approx(2.0)


def test_a_watcher_that_is_stopped_between_its_look_and_its_judgement_blames_no_other() -> None:
    clock = FakeClock()
    fair = FairClock(clock)
    look(clock, fair, 10)
    beat_s = clock() - 0.05
    clock.now_s += 2.3
    assert fair.since(beat_s) == pytest.approx(0.05)
    assert silence(os.getpid(), beat_s, fair, stopped_s=1.0, hung_s=2.0) is None
    fair.look()  # the watched process has not run yet either
    assert silence(os.getpid(), beat_s, fair, stopped_s=1.0, hung_s=2.0) is None
    look(clock, fair, 16)
    reason = silence(os.getpid(), beat_s, fair, stopped_s=1.0, hung_s=2.0)
    assert reason == "hung: its interpreter has not run for 2.2 s"


def test_time_without_a_processor_counts_a_quarter_so_that_a_hang_is_found_all_the_same() -> None:
    clock = FakeClock()
    fair = FairClock(clock)
    begin_s = clock()
    look(clock, fair, 100, starved_s=0.05)
    assert fair.since(begin_s) == pytest.approx(5.0)
    look(clock, fair, 100, starved_s=0.1)
    assert fair.since(begin_s) == pytest.approx(5.0 + 2.5)


def test_a_loss_before_a_moment_does_not_count_for_it() -> None:
    clock = FakeClock()
    fair = FairClock(clock)
    clock.now_s += 10.0
    fair.look()
    begin_s = clock()
    clock.now_s += 0.3
    fair.look()
    assert fair.since(begin_s) == pytest.approx(0.3)
    assert fair.since(begin_s - 1.0) == pytest.approx(0.3)  # all of that second was lost
