"""A wait at the start has a limit, and is told after 5 s."""

from __future__ import annotations

import threading

import pytest

from holdfast.parallel.output import Waiting, waiting
from support.processes.fake_clock import FakeClock


def test_a_wait_is_told_once_after_5_s_and_ends_at_its_limit() -> None:
    clock, told = FakeClock(), list[str]()
    wait = Waiting("the store at h:1", 60.0, tell=told.append, clock=clock)
    moments = []
    while wait.left_s("refused") > 0:
        clock.sleep(1.0)
        moments.append((clock() - 1000.0, len(told)))
    assert [told_then for moment, told_then in moments if moment < 6.0] == [0] * 5
    assert told == ["waiting for the store at h:1 since 5 s (refused); given up after 60 s"]
    assert moments[-1][0] == pytest.approx(60.0)


def test_a_call_that_blocks_is_told_from_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "TELL_AFTER_S", 0.01)
    told, line = threading.Event(), list[str]()

    def tell(text: str) -> None:
        line.append(text)
        told.set()

    with Waiting("a name", 9.0, tell=tell).in_a_call():
        assert told.wait(10)
    assert line[0].startswith("waiting for a name since")


def test_a_call_that_returns_soon_is_not_told() -> None:
    told = list[str]()
    with Waiting("a name", 9.0, tell=told.append).in_a_call():
        pass
    assert told == []
