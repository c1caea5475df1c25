"""Slow links are tried when something seems slow twice running, told once, and tried seldom."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.parallel.comm.flight_recorder import FlightRecorder
from holdfast.parallel.comm.timings.messages import TimedMessage
from holdfast.parallel.comm.timings.window import Window
from holdfast.trainer.reports import slow_links
from holdfast.trainer.reports.slow_links import LinkClock

STEP_S = 10.0
Compare = Callable[[Window], list[Any]]


def window(slow: float, *, trial_s: float = 0.0, usual_s: float = 0.1) -> Window:
    """Messages among four ranks, of which those of rank 2 take so many times as long."""
    messages = [
        TimedMessage(a, b, "x", 1 << 20, usual_s * (slow if a == 2 else 1.0))
        for a in range(4)
        for b in range(4)
        if a != b
        for _ in range(8)
    ]
    return Window(messages, STEP_S, trial_s, shares_clock=True)


class Scene:
    """A clock whose windows and trials are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trials: list[int] = []
        """The sizes of the messages of each."""
        self.trial = window(4.0)
        self._given: list[Window] = []
        self._clock = LinkClock()
        groups = SimpleNamespace(recorder=FlightRecorder(0), control=None, world=None)
        self._training: Any = SimpleNamespace(groups=groups, rank=0, device=None)
        monkeypatch.setattr(slow_links, "window_of", lambda *_, **__: self._given.pop(0))
        monkeypatch.setattr(slow_links, "probe", lambda _w, _e, size, _d: self.trials.append(size))

    def compare(self, given: Window) -> list[tuple[str, int | None, float]]:
        """What is told after a step with such messages."""
        self._given = [given, self.trial]
        self._clock.start(self._training)
        found = self._clock.compare(self._training, 1.5)
        return [(link.side, link.source, round(link.excess_s, 6)) for link in found]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_what_is_slow_twice_running_and_when_it_is_tried_is_told_once(scene: Scene) -> None:
    told = [scene.compare(window(slow)) for slow in (4.0, 1.0, 4.0, 4.0, 4.0, 4.0)]
    # Eight messages take 0.3 s more each.
    assert told == [[], [], [], [("sender", 2, 2.4)], [], []]


def test_what_is_not_slow_when_it_is_tried_is_not_told(scene: Scene) -> None:
    scene.trial = window(1.0)
    assert [scene.compare(window(4.0)) for _ in range(3)] == [[], [], []]
    assert len(scene.trials) == 2


def test_what_was_well_in_between_is_told_again(scene: Scene) -> None:
    assert [scene.compare(window(4.0)) for _ in range(2)][-1]
    scene.trial = window(1.0)
    assert scene.compare(window(4.0)) == []
    scene.trial = window(4.0)
    assert scene.compare(window(4.0))


def test_trials_take_half_a_percent_of_the_time_at_most(scene: Scene) -> None:
    scene.trial = window(1.0, trial_s=1.0)  # of 200 s, which are 20 steps
    for _ in range(43):
        scene.compare(window(4.0, trial_s=1.0 if scene.trials else 0.0))
    assert len(scene.trials) == 3


def test_what_costs_less_than_a_hundredth_of_a_step_is_not_tried(scene: Scene) -> None:
    for _ in range(3):
        assert scene.compare(window(4.0, usual_s=0.004)) == []  # 0.096 s of 10
    assert scene.trials == []
    for _ in range(2):
        scene.compare(window(4.0, usual_s=0.005))
    assert len(scene.trials) == 1


def test_messages_of_a_trial_are_as_long_as_the_network_is_quick(scene: Scene) -> None:
    for _ in range(2):
        scene.compare(window(4.0, usual_s=0.1))
    scene.compare(window(1000.0, usual_s=0.0005))
    assert scene.trials == [1 << 19, int(0.005 * (1 << 20) / 0.0005)]
