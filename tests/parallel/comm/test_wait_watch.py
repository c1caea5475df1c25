"""A rank that waits finds those that keep it waiting, and tells of nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, Store

from holdfast.parallel.comm import FlightRecorder
from holdfast.parallel.comm.tags import COLLECTIVES, REDUCTION
from holdfast.parallel.comm.wait_watch import WaitNews, WaitWatch, Word, ends_of_chain
from support.processes.fake_clock import FakeClock
from support.runs.commands import CONFIG, HOLDFAST, environment, lines_of

GROUPS = {"world": range(4)}


@dataclass
class Rank:
    """A rank with its recorder and watch, on the clock of the test."""

    number: int
    clock: FakeClock
    store: Store
    news: list[WaitNews] = field(default_factory=list)
    groups: dict[str, range] = field(default_factory=lambda: GROUPS)

    def __post_init__(self) -> None:
        self.recorder = FlightRecorder(self.number)
        tell = self.news.append
        self.watch = WaitWatch(
            self.number, self.groups, self.recorder, self.store, tell, clock=self.clock
        )

    def step(self, number: int) -> None:
        self.recorder.note_step(number)

    def wait_for(self, peer: int, tag: int = REDUCTION.first) -> int:
        code = self.recorder.group("world")
        posted = self.recorder.post(code, "receive", "receive", peer, 8, tag)
        self.recorder.waiting(posted)
        return posted


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    """Four ranks that have made steps of 0.1 s, on one clock."""
    clock = FakeClock()
    monkeypatch.setattr(time, "monotonic", clock)
    store = HashStore()
    monkeypatch.setattr(HashStore, "clone", lambda self: self)
    found = [Rank(number, clock, store) for number in range(4)]
    for step in (1, 2, 3):
        for rank in found:
            rank.step(step)
        clock.now_s += 0.1
    return found


def pass_time(ranks: list[Rank], seconds: float, *, stopped: tuple[int, ...] = ()) -> None:
    """Let time pass, in which all ranks but the stopped ones look once a second."""
    for _ in range(int(seconds)):
        ranks[0].clock.now_s += 1.0
        for rank in ranks:
            if rank.number not in stopped:
                rank.watch.look()


def test_the_rank_at_the_end_of_the_chain_is_named_and_told_ever_later(ranks: list[Rank]) -> None:
    waits = [ranks[0].wait_for(2), ranks[2].wait_for(1), ranks[3].wait_for(0, COLLECTIVES.first)]
    pass_time(ranks, 4)
    assert not any(rank.news for rank in ranks)
    pass_time(ranks, 57, stopped=(1,))
    for rank in (ranks[0], ranks[2], ranks[3]):
        assert [news.peers for news in rank.news] == [(1,)] * 3
        assert [round(news.seconds) for news in rank.news] == [5, 15, 45]
    assert [rank.news[0].is_teller for rank in (ranks[0], ranks[2], ranks[3])] == [
        True,
        False,
        False,
    ]
    assert ranks[0].news[0].line() == (
        "rank 0 has waited 5 s for rank 1 (gradient sums on their way to owners, in step 3); "
        "it waits for no other: it is slow, stopped or cut off"
    )
    assert "(receive, in step 3)" in ranks[3].news[0].line()
    for rank, wait in zip((ranks[0], ranks[2], ranks[3]), waits, strict=True):
        rank.recorder.finished(wait)
        rank.step(4)
    pass_time(ranks, 3)
    assert ranks[0].news[-1].line() == "rank 0 went on after 62 s; it waited for rank 1"
    assert len(ranks[0].news) == 4


def test_few_of_many_ranks_ask_what_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = FakeClock(), HashStore()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(HashStore, "clone", lambda self: self)
    many = [Rank(number, clock, store, groups={"world": range(40)}) for number in range(40)]
    for rank in many:
        rank.step(1)
        posted = rank.recorder.post(
            rank.recorder.group("world"), "all_reduce", "collective", -1, 8, 0
        )
        rank.recorder.waiting(posted)
    pass_time(many, 30, stopped=(3,))
    told = {rank.number for rank in many if rank.news}
    assert told == {*range(8), *range(32, 40)} - {3}
    assert [rank.number for rank in many if rank.news and rank.news[0].is_teller] == [0]
    assert many[0].news[0].peers == (3,)


def test_nobody_is_named_while_a_rank_is_busy_or_was_itself_stopped(ranks: list[Rank]) -> None:
    ranks[0].wait_for(1)
    with ranks[1].recorder.busy("save", 600.0):
        pass_time(ranks, 60)
    assert not ranks[0].news
    # All looks of a process that was stopped are late; its own wait counts from its return.
    ranks[3].wait_for(1)
    pass_time(ranks, 40, stopped=(3,))
    pass_time(ranks, 4)
    assert not ranks[3].news
    pass_time(ranks, 2)
    assert [news.peers for news in ranks[3].news] == [(1,)]


def test_a_wait_of_a_few_usual_steps_is_not_told(ranks: list[Rank]) -> None:
    for step in (4, 5, 6, 7, 8):
        ranks[0].clock.now_s += 20.0
        ranks[0].step(step)
    ranks[0].watch.look()
    ranks[0].wait_for(1)
    pass_time(ranks, 55)
    assert not ranks[0].news
    pass_time(ranks, 10)
    assert len(ranks[0].news) == 1


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        ({}, {1}),
        ({1: Word(1, (2,)), 2: Word(1, (3,))}, {3}),
        ({1: Word(1, (2, 3)), 3: Word(1, (0,))}, {2}),
        ({1: Word(1, (2,)), 2: Word(1, (), "save")}, set()),
        ({1: Word(1, (2,)), 2: Word(1, (1,))}, {1}),
    ],
)
def test_the_ends_of_chains(words: dict[int, Word], ends: set[int]) -> None:
    assert ends_of_chain(0, frozenset({1}), words.get) == ends


@pytest.mark.mp
def test_a_stopped_worker_is_named_while_it_keeps_the_others_waiting(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        CONFIG.replace("steps = 6", "steps = 100000").replace("pipeline = 2", "")
    )
    arguments = ("train", "run.toml", "--out", "run", "--set", "log.every=100000")
    command = [*HOLDFAST, *arguments]
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    events = tmp_path / "run/events.jsonl"

    def event(kind: str) -> dict[str, Any]:
        found = [e for e in lines_of(events) if e["event"] == kind] if events.exists() else []
        return next(iter(found), {})

    def wait_for(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while not (found := condition()):
            assert run.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.05)
        return found

    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 20)
        (pid,) = (
            e["pid"] for e in lines_of(events) if e["event"] == "worker_started" and e["rank"] == 1
        )
        os.kill(pid, signal.SIGSTOP)
        told = wait_for(lambda: event("waiting"))
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: event("went_on"))
    finally:
        run.kill()
        run.wait()
    assert (told["rank"], told["peers"]) == (0, [1])
    assert "rank 0 has waited " in (tmp_path / "output").read_text()
