"""Decisions that depend on time, with clocks and signals that tests hold in their hands."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.elastic import faults
from holdfast.elastic.faults import Fault, FaultEffects, FaultInjector, ask_for
from holdfast.elastic.generation import Identity, parse_identities
from holdfast.elastic.lighthouse import LighthouseAway
from holdfast.elastic.membership_events import Bulletin, MembershipEvent
from holdfast.elastic.quorum_client import MembershipSettings
from holdfast.elastic.watch import HeartbeatWatch
from holdfast.parallel.schedules import FAULTS, StepPhase


class Store:
    """Counters and values of one process."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.values: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        self.counters[key] = self.counters.get(key, 0) + amount
        return self.counters[key]

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> str:
        return self.values[key]


def test_a_missing_event_is_waited_for_a_second_and_then_passed() -> None:
    store: Any = Store()
    now = 100.0
    bulletin = Bulletin(store, clock=lambda: now)
    store.add("events", 1)  # its author dies before it sets the event
    event = MembershipEvent("ended", Identity(1), "killed")
    bulletin.post(event)
    assert bulletin.read() == []
    now = 100.9
    assert bulletin.read() == []
    now = 101.1
    assert bulletin.read() == [event]


def test_silence_counts_only_a_while_after_the_lighthouse_is_back() -> None:
    asked, told, judged = threading.Event(), threading.Event(), threading.Event()
    events: list[MembershipEvent] = []
    state = {"now": 50.0, "away": 1}

    def ages(run: str) -> dict[Identity, float]:
        if state["away"]:
            state["away"] = 0
            raise LighthouseAway("no answer")
        (judged if asked.is_set() else asked).set()
        return {Identity(0): 0.1, Identity(1): 9.0}

    def receive(event: MembershipEvent) -> None:
        events.append(event)
        told.set()

    settings = MembershipSettings("http://127.0.0.1:9", "run", 2, heartbeat_ms=10)
    watch = HeartbeatWatch(settings, receive, ages=ages, clock=lambda: state["now"])
    try:
        watch.watch(1, parse_identities("0-1"))
        assert judged.wait(10)
        assert events == []  # a silent worker may not have had time for a heartbeat
        state["now"] += 2.5
        assert told.wait(10)
    finally:
        watch.close()
    assert [(event.kind, event.identity) for event in events] == [("silent", Identity(1))]


def injector(folder: Path, *faults: Fault, rank: int = 1) -> tuple[FaultInjector, list[Any]]:
    done: list[Any] = []
    made = FaultInjector(
        rank,
        0,
        faults,
        asked=folder / "chaos.jsonl",
        note=lambda fault: done.append(f"note {fault.fault} at step {fault.step}"),
        effects=FaultEffects(
            corrupt=lambda: done.append("corrupt"),
            cut=lambda seconds: done.append(("cut", seconds)),
            deadlock=lambda: done.append("deadlock"),
            miscompute=lambda seconds: done.append(("miscompute", seconds)),
        ),
        disk=folder,
        signal_self=done.append,
        sleep=lambda seconds: done.append(("sleep", seconds)),
    )
    return made, done


def test_a_fault_happens_once_in_its_rank_at_its_step_and_phase(tmp_path: Path) -> None:
    kill = Fault("kill", rank=1, step=3, phase="reduce")
    made, done = injector(tmp_path, kill, Fault("stop", rank=0, step=1))
    other, nothing = injector(tmp_path, kill, rank=2)
    phases: tuple[StepPhase, ...] = ("compute", "reduce", "vote", "apply")
    for step in range(1, 6):
        for number, phase in enumerate(phases):
            made.at(step, phase)
            other.at(step, phase)
            happened = (step, number) >= (3, 1)
            assert done == (["note kill at step 3", signal.SIGKILL] if happened else [])
    assert nothing == []


def test_a_fault_that_is_asked_for_is_read_and_a_slow_rank_stays_slow(tmp_path: Path) -> None:
    made, done = injector(tmp_path)
    made.at(1, "compute")
    ask_for(tmp_path / "chaos.jsonl", Fault("slow", rank=1, step=2, seconds=0.5))
    ask_for(tmp_path / "chaos.jsonl", Fault("cut", rank=1, step=3, seconds=7.0))
    for step in (2, 3, 4):
        made.at(step, "compute")
    assert done == [
        "note slow at step 2",
        ("sleep", 0.5),
        "note cut at step 3",
        ("cut", 7.0),
        ("sleep", 0.5),
    ]


@pytest.mark.parametrize("asked", [0, 4])
def test_a_fault_that_is_asked_for_at_once_or_too_late_happens_in_the_next_step(
    tmp_path: Path, asked: int
) -> None:
    made, done = injector(tmp_path)
    made.at(4, "compute")
    ask_for(tmp_path / "chaos.jsonl", Fault("exit", rank=0, step=asked))
    ask_for(tmp_path / "chaos.jsonl", Fault("stop", rank=1, step=asked, phase="vote"))
    made.at(4, "vote")
    made.at(5, "compute")
    assert done == []
    made.at(5, "vote")
    made.at(6, "vote")
    assert done == ["note stop at step 5", signal.SIGSTOP]


def test_every_kind_of_fault_is_told_and_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[Any] = []
    monkeypatch.setattr("os._exit", lambda code: happened.append(("exit", code)))
    monkeypatch.setattr(faults, "fill_disk", lambda disk, seconds: happened.append(("full", disk)))
    monkeypatch.setattr(faults, "write_without_end", happened.append)
    monkeypatch.setattr(faults, "throttle", lambda *how: happened.append(how))
    monkeypatch.setattr("ctypes.PyDLL", lambda name: SimpleNamespace(usleep=happened.append))
    for kind in FAULTS:
        made, done = injector(tmp_path, Fault(kind, rank=1, step=1, seconds=0.5))
        made.at(1, "compute")
        made.at(2, "compute")
        made.at(2, "micro-batch")
        assert done[0] == f"note {kind} at step 1"
        assert len(done) == 2 or happened, f"{kind} does nothing"
        happened.clear()


def test_a_kind_of_fault_without_an_action_is_an_error(tmp_path: Path) -> None:
    made, _ = injector(tmp_path, Fault("burn", rank=1, step=1))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="burn"):
        made.at(1, "compute")


def test_a_slow_micro_batch_takes_a_multiple_of_what_it_computed(tmp_path: Path) -> None:
    slept: list[float] = []
    made, _ = injector(tmp_path, Fault("slow-compute", rank=1, step=1, seconds=60.0, factor=4.0))
    made._slowdown._sleep = slept.append
    made.at(1, "compute")
    used = time.thread_time()
    while time.thread_time() - used < 0.02:
        pass
    made.at(1, "micro-batch")
    assert slept[0] == pytest.approx(3 * 0.02, abs=0.01)


@pytest.mark.mp
def test_a_throttled_process_computes_a_share_of_the_time() -> None:
    code = "import time\nwhile True: time.sleep(0)"
    with subprocess.Popen([sys.executable, "-c", code]) as busy:
        try:
            faults.throttle(busy.pid, seconds=30.0, factor=4.0)
            states = []
            for _ in range(200):
                time.sleep(0.005)
                stat = Path(f"/proc/{busy.pid}/stat").read_text()
                states.append(stat.rpartition(")")[2].split()[0])
        finally:
            busy.kill()
    assert 0.5 < states.count("T") / len(states) < 0.95  # three quarters
