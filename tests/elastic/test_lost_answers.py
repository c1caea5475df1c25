"""Agreement over a network that loses, delays, repeats and reorders every message.

Clock, network and Lighthouse are of this process, so that thousands of schedules take seconds.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from holdfast.elastic.agreement import (
    AcceptorState,
    Attendance,
    PassedOver,
    Report,
    advance,
    aware,
    generation_of,
)
from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.quorum_client import PAUSE_S, MembershipSettings
from holdfast.elastic.teller import told_next

SETTINGS = MembershipSettings("", "run", 4, hang_timeout_s=0.0)
JOIN_S = 0.1
TELL_S = 0.2
BAD_S = 3.0
"""Seconds for which the network is bad: less than missing members are waited for."""
SLOW_S = 12.0
"""The longest time for which a worker cannot leave its step: longer than missing ones are waited
for."""
LIMIT_S = 30.0
"""Seconds after which all must be together."""
SCHEDULES = 30_000 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 1_000


@dataclass
class Worker:
    """One worker, as `Membership` and its teller act for it; or the agent of an ended one."""

    report: Report
    attendance: Attendance
    leaves_s: float = 0.0
    """The time until which it cannot leave its step."""
    generation: Generation | None = None
    call: int = 0
    """The number of the call whose answer it waits for; others are too late."""
    tells: Report | None = None
    """What it reports next as a settled worker; None: it takes part."""
    passed_by: AcceptorState | None = None
    """The generation that was chosen without it, once it has ended."""
    know: frozenset[Identity] = frozenset()
    over: bool = False


@dataclass
class World:
    """Workers, a Lighthouse with torchft's rule, and the messages under way."""

    random: random.Random
    loss: float
    workers: dict[Identity, Worker] = field(default_factory=dict)
    now_s: float = 0.0
    joined: dict[Identity, tuple[float, Report]] = field(default_factory=dict)
    calls: dict[Identity, list[int]] = field(default_factory=dict)
    last: frozenset[Identity] = frozenset()
    decided: dict[int, str] = field(default_factory=dict)
    superseded: list[Identity] = field(default_factory=list)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    count: itertools.count[int] = field(default_factory=itertools.count)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_s + seconds, next(self.count), act))

    def carry(self, act: Callable[[], None]) -> None:
        """Carry a message: it may come late, twice, after a later one, or never."""
        bad = self.now_s < BAD_S
        for _ in range(1 + (bad and self.random.random() < self.loss / 2)):
            if bad and self.random.random() < self.loss:
                continue
            late = bad and self.random.random() < self.loss
            self.after(self.random.expovariate(1 / (0.4 if late else 0.002)), act)

    def run(self) -> bool:
        """Until all are together; whether that was in time."""
        while self.events and self.now_s < LIMIT_S:
            self.now_s, _, act = heapq.heappop(self.events)
            act()
            if self.together():
                return True
        return False

    def together(self) -> bool:
        """Whether all that live are in one generation of theirs. Asked after each event."""
        live = [w for w in self.workers.values() if w.report.alive and not w.over]
        generations = [w.generation for w in live if w.generation is not None and w.tells]
        if not live or len(generations) < len(live) or len({g.number for g in generations}) > 1:
            return False
        if len({g.prefix for g in generations}) > 1:
            return False
        return generations[0].identities == {w.report.identity for w in live}

    # The calls of workers.

    def begin_call(self, identity: Identity) -> None:
        worker = self.workers[identity]
        if worker.over:
            return
        worker.call = call = next(self.count)
        overdue = worker.attendance.overdue(worker.report.acceptor.members)
        sent = worker.tells or replace(worker.report, lost=worker.report.lost | overdue)
        self.carry(lambda: self.join(identity, sent, call))

        def give_up() -> None:
            if worker.call == call:
                self.begin_call(identity)

        self.after(SETTINGS.call_s, give_up)

    def answer(self, identity: Identity, call: int, reports: Mapping[Identity, Report]) -> None:
        worker = self.workers[identity]
        if worker.call != call or worker.over:
            return
        worker.call, pause_s = -1, PAUSE_S
        if worker.tells is not None:
            assert worker.generation is not None
            settled = replace(worker.tells, told=None)
            worker.tells, found = told_next(settled, worker.generation, reports)
            pause_s = PAUSE_S if worker.tells.told else TELL_S
            if found and self.now_s >= worker.leaves_s:
                self.begin_again(worker)
        else:
            pause_s = self.conclude(worker, reports)
        self.after(pause_s, lambda: self.begin_call(identity))

    def conclude(self, worker: Worker, reports: Mapping[Identity, Report]) -> float:
        worker.attendance.note(reports)
        if worker.passed_by is not None:
            worker.know |= aware(worker.passed_by, reports)
            worker.over = worker.know >= worker.passed_by.members
            return PAUSE_S
        try:
            verdict = advance(worker.report, reports)
        except PassedOver as over:
            if worker.report.alive:
                worker.over = True
                self.superseded.append(worker.report.identity)
            worker.passed_by = over.chosen
            return 0.0
        acceptor = verdict.acceptor
        worker.report = replace(worker.report, acceptor=acceptor)
        if not worker.report.alive:
            worker.over = acceptor.generation > 0 and worker.report.identity not in acceptor.members
        elif verdict.outcome == "agreed":
            worker.generation = found = verdict.learnt or generation_of(acceptor, reports)
            assert self.decided.setdefault(found.number, found.prefix) == found.prefix
            worker.tells = replace(worker.report, held=found.number, settled=True)
            return TELL_S
        return PAUSE_S if verdict.outcome == "wait" else 0.0

    def begin_again(self, worker: Worker) -> None:
        """Come to agree again, because a member cannot go on in this generation."""
        assert worker.generation is not None
        worker.tells, worker.attendance = None, self.attendance()
        step = worker.report.step + self.random.randrange(2)
        worker.report = replace(worker.report, held=worker.generation.number, step=step)

    def attendance(self) -> Attendance:
        return Attendance(SETTINGS.patience_s, SETTINGS.agree_s, lambda: self.now_s)

    def slow_down(self, identity: Identity, generation: Generation) -> None:
        """Have a member of a generation be at work in its step for a time."""
        worker = self.workers[identity]
        worker.leaves_s = self.random.uniform(0, SLOW_S)
        worker.generation = generation
        worker.tells = replace(worker.report, settled=True)

        def leave() -> None:
            if not worker.over:
                self.begin_again(worker)

        self.after(worker.leaves_s, leave)

    # The Lighthouse.

    def join(self, identity: Identity, report: Report, call: int) -> None:
        self.joined[identity] = (self.now_s, report)
        self.calls.setdefault(identity, []).append(call)
        self.tick()
        self.after(JOIN_S + 0.001, self.tick)

    def tick(self) -> None:
        healthy = sum(not worker.over for worker in self.workers.values())
        if not self.joined or not self.last or not self.last <= self.joined.keys():
            first_s = min((at_s for at_s, _ in self.joined.values()), default=self.now_s)
            patient = len(self.joined) < healthy and self.now_s - first_s < JOIN_S
            if not self.joined or len(self.joined) <= healthy // 2 or patient:
                return
        reports = {identity: report for identity, (_, report) in self.joined.items()}
        for identity in self.joined:
            for call in self.calls.pop(identity, ()):
                self.carry(lambda i=identity, c=call: self.answer(i, c, reports))
        self.last = frozenset(reports)
        self.joined.clear()

    def kill(self, identity: Identity) -> None:
        """End a process; its agent goes on to report what it accepted, and tells the others."""
        ended = self.workers[identity]
        ended.report = replace(ended.report, alive=False, held=0, settled=False)
        ended.tells, ended.call = None, -1
        self.after(0.05, lambda: self.begin_call(identity))
        for worker in self.workers.values():
            worker.report = replace(worker.report, lost=worker.report.lost | {identity})


def world(seed: int) -> World:
    """A run of 2 to 5 workers at its start or in a generation, on a network that is bad."""
    chance = random.Random(seed)
    made = World(chance, loss=chance.choice([0.0, 0.1, 0.3, 0.5]))
    start = frozenset(Identity(rank) for rank in range(chance.randint(2, 5)))
    first = chance.choice([AcceptorState(), AcceptorState(1, start)])
    for identity in start:
        report = Report(
            identity, first, founder=True, world_size=len(start), held=first.generation, step=3
        )
        made.workers[identity] = Worker(report, made.attendance())
        made.after(chance.uniform(0, 0.3), lambda i=identity: made.begin_call(i))
    if first.generation and chance.random() < 0.3:
        generation = generation_of(first, {i: w.report for i, w in made.workers.items()})
        for identity in chance.sample(sorted(start), chance.randint(1, len(start) - 1)):
            made.slow_down(identity, generation)
    if first.generation and len(start) > 2 and chance.random() < 0.3:
        at_s = chance.uniform(0, BAD_S)
        for identity in chance.sample(sorted(start), chance.randint(1, len(start) - 1)):
            made.after(at_s, lambda i=identity: made.kill(i))
    return made


def check(seeds: range) -> None:
    for seed in seeds:
        made = world(seed)
        killed = len(made.workers)
        in_time = made.run()
        killed -= sum(worker.report.alive for worker in made.workers.values())
        told = {str(i): (w.report.acceptor, w.generation) for i, w in made.workers.items()}
        assert made.superseded == [], f"seed {seed}: a healthy worker was left out"
        assert in_time, f"seed {seed}: not together after {made.now_s:.1f} s: {told}"


def test_no_lost_or_late_message_splits_a_run_holds_it_up_or_costs_a_healthy_worker() -> None:
    check(range(300))


@pytest.mark.slow
def test_a_thousand_schedules_end_with_all_together() -> None:
    check(range(300, SCHEDULES))
