"""When an agent starts, kills and gives up its workers: with a clock and workers of the test's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from holdfast.elastic import Roll
from holdfast.elastic.agreement import AcceptorFile, AcceptorState
from holdfast.elastic.generation import Identity
from holdfast.elastic.membership_events import MembershipEvent, event_to_data
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.launch.agent.liveness import LEAVING_S, LEFT_OUT_S
from holdfast.launch.agent.restarts import NO_PROGRESS_EXIT, RestartPolicy
from holdfast.parallel.comm import FlightRecord, Operation
from support.processes.fake_node import FakeNode

BOTH = (Identity(0), Identity(1))
MEMBERS = (*BOTH, Identity(2))
LOST = MembershipEvent("ended", Identity(2), "killed by SIGKILL")
CALLED = MembershipEvent("agreeing", Identity(2), "between steps", generation=1)
TICK_S = pytest.approx(0.15, abs=0.15)
"""The agent looks at its clock so often."""


def test_a_worker_that_keeps_failing_is_started_ever_later_and_then_given_up(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    node.on_start = lambda spec: node.end(spec.rank, 7)
    policy = RestartPolicy(limit=5, first_s=10.0, longest_s=30.0)
    assert node.run(restarts=policy) == NO_PROGRESS_EXIT
    assert [identity for _, identity in node.started] == [Identity(0, n) for n in range(6)]
    moments = [moment for moment, _ in node.started]
    pauses = [after - before for before, after in pairwise(moments)]
    assert pauses == pytest.approx([0.0, 10.0, 20.0, 30.0, 30.0], abs=0.3)
    assert node.killed == []


def test_workers_that_outlive_the_run_are_killed_at_the_deadline(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()

    def script() -> None:
        for rank in (0, 1):
            if not node.others.generation:
                node.tell_generation(rank, 1, BOTH)
        if node.clock() >= begin + 5 and len(node.living) == 2:
            node.finish(0)

    node.on_wait = script
    assert node.run(ranks=(0, 1), exit_s=60.0) == 0
    ((moment, rank),) = node.killed
    assert rank == 1
    assert moment - begin - 5 - 60 == TICK_S
    assert [identity for _, identity in node.started] == list(BOTH)  # none is started any more


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_worker_that_the_others_went_on_without_may_end_by_itself_and_is_killed_later(
    tmp_path: Path, has_ended: bool
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()

    def script() -> None:
        if not node.others.generation:
            node.tell_generation(0, 1, BOTH)
            node.tell_generation(1, 1, BOTH)
        elif node.others.generation == 1:
            node.tell_generation(0, 2, BOTH[:1])
        elif has_ended and node.clock() > begin + 3 and 1 in node.living:
            node.end(1, 3)
        elif node.clock() > begin + 2 * LEFT_OUT_S:
            node.finish(0)

    node.on_wait = script
    assert node.run(ranks=(0, 1), respawn=False, exit_s=1.0) == 0
    if has_ended:
        assert node.killed == []
        return
    ((moment, rank),) = node.killed
    assert rank == 1
    assert moment - begin - LEFT_OUT_S == pytest.approx(0.3, abs=0.3)


def test_a_store_is_hosted_until_the_others_have_heard_how_its_node_ended(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    node.on_start = lambda spec: node.end(spec.rank, -9)
    node.run(respawn=False, founder=False)
    assert [event.cause for event in node.others.posted] == ["killed by SIGKILL"]
    assert node.others.store_at_close is not None  # what was posted lies in it


def test_a_node_that_is_not_taken_in_asks_now_and_then_whether_the_run_is_over(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    begin, asked = node.clock(), []

    def is_over() -> bool:
        asked.append(node.clock() - begin)
        return node.clock() > begin + 5

    assert node.run(founder=False, is_over=is_over) == 3
    assert len(asked) == pytest.approx(11, abs=2)  # twice a second
    assert [rank for _, rank in node.killed] == [0]


def receive(peer: int, since_s: float) -> Operation:
    nan = math.nan
    return Operation(
        1, "world", "receive", "receive", peer, 8, 7, "open", since_s, since_s, since_s, nan
    )


@dataclass
class Records:
    """The flight records of ranks 0 and 1: from a second on, rank 0 waits for rank 1."""

    node: FakeNode
    since_s: float
    of_1: FlightRecord = field(
        default_factory=lambda: FlightRecord(1, 0, 1, 4, 0.0, (), step_starts_s=(0.5, 1.0))
    )

    after_that: Callable[[], object] = lambda: None
    """What workers tell once both are in the generation."""

    def read(self, spec: WorkerSpec) -> FlightRecord | None:
        if spec.rank:
            return self.of_1
        waits = (receive(1, self.since_s),) if self.node.clock() >= self.since_s else ()
        return FlightRecord(0, 0, 1, 4, 0.0, waits, step_starts_s=(0.5, 1.0))

    def run(self, until_s: float = math.inf, **settings: Any) -> int:
        """Run the node until a worker was killed, or until this time."""

        def script() -> None:
            if not self.node.others.generation:
                self.node.tell_generation(0, 1, MEMBERS)
                self.node.tell_generation(1, 1, MEMBERS)
                self.after_that()
            if (self.node.killed or self.node.clock() > until_s) and 0 in self.node.living:
                self.node.finish(0)

        self.node.on_wait = script
        settings = {"respawn": False, "exit_s": 1.0, "read_record": self.read, **settings}
        return self.node.run(ranks=(0, 1), **settings)

    def end_with_all_alive(self, until_s: float) -> None:
        """Run the node; the agent kills rank 1 only as it outlives the run, by more than exit_s."""
        assert self.run(until_s) == 0
        assert [rank for _, rank in self.node.killed] == [1]
        assert "the run has ended, and it has not ended within" in self.node.others.posted[-1].cause


def test_a_worker_that_hangs_is_killed_once_all_waits_have_had_time_to_arrive(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    assert Records(node, begin + 1.0).run() == 0
    ((moment, rank),) = node.killed
    assert rank == 1
    assert 12 < moment - begin < 12.5
    causes = [event.cause for event in node.others.posted]
    assert causes[0].startswith("has waited 10.0 s for rank 1 (rank 0: receive from rank 1")
    assert " silent for 10.0 s in step 4: " in causes[0]
    assert causes[1] == f"hung: rank 0 {causes[0]}"


def test_a_busy_worker_is_killed_once_it_is_busy_for_longer_than_it_said(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    records = Records(node, begin + 1.0)
    records.of_1 = replace(records.of_1, busy="save", busy_until_s=begin + 50.0)
    assert records.run() == 0
    ((moment, rank),) = node.killed
    assert rank == 1
    assert moment - begin == pytest.approx(50.1, abs=0.15)
    assert node.others.posted[1].cause.endswith("it said that it would save until then at most")


def test_a_worker_that_was_busy_a_short_time_ago_or_waits_itself_lives(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    records = Records(node, begin + 1.0)
    records.of_1 = replace(records.of_1, busy_ended_s=begin + 20.0)
    records.end_with_all_alive(begin + 28.0)
    node = FakeNode(tmp_path)
    records = Records(node, begin + 1.0)
    records.of_1 = replace(records.of_1, operations=(receive(2, begin + 27.0),))
    records.end_with_all_alive(begin + 29.0)


def test_a_worker_that_agrees_is_not_to_blame_for_others_that_still_wait_for_it(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    records = Records(node, begin + 1.0)
    records.after_that = lambda: node.tell(1, "agreeing")
    records.end_with_all_alive(begin + 40.0)


@pytest.mark.parametrize("event", [LOST, CALLED], ids=["lost", "called"])
@pytest.mark.parametrize("busy_s", [0.0, 50.0])
def test_a_worker_may_be_at_work_in_a_step_that_others_have_left_for_as_long_as_any_wait_may_last(
    tmp_path: Path, busy_s: float, event: MembershipEvent
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    records = Records(node, math.inf)
    if busy_s:
        records.of_1 = replace(records.of_1, busy="save", busy_until_s=begin + busy_s)

    def leave() -> None:
        node.tell(0, "event", event=event_to_data(event))
        node.tell(0, "agreeing")

    records.after_that = leave
    assert records.run() == 0
    ((moment, rank),) = node.killed
    assert rank == 1
    assert moment - begin == pytest.approx(busy_s or 10.2 + LEAVING_S, abs=0.2)
    cause = node.others.posted[-1].cause
    assert cause.startswith("hung: it has not left its step for ")
    assert cause.endswith(f"as rank 2 is {event.kind} ({event.cause})")


def test_a_loss_of_an_earlier_generation_makes_no_worker_leave_its_step(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    records = Records(node, math.inf)
    gone = [
        MembershipEvent("ended", Identity(3), "killed by SIGKILL"),
        MembershipEvent("silent", Identity(2), "no heartbeat for 3.00 s", generation=7),
        MembershipEvent("joining", Identity(3), "a new worker wants to take part"),
    ]
    records.after_that = lambda: [
        node.tell(0, "event", event=event_to_data(event)) for event in gone
    ]
    records.end_with_all_alive(begin + 40.0)


def test_an_agent_that_was_itself_stopped_does_not_count_that_time_as_a_wait(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    records = Records(node, begin + 1.0)
    read = records.read

    def stopped_once(spec: WorkerSpec) -> FlightRecord | None:
        if begin + 5.0 < node.clock() < begin + 6.0:
            node.clock.now_s += 100.0
        return read(spec)

    records.read = stopped_once  # type: ignore[method-assign]
    assert records.run() == 0
    ((moment, rank),) = node.killed
    assert rank == 1
    assert moment - begin > 110.0


@pytest.mark.parametrize("code", [0, -9, 1])
def test_a_run_has_ended_when_a_worker_says_so_however_its_process_ends(
    tmp_path: Path, code: int
) -> None:
    node = FakeNode(tmp_path)
    node.on_wait = lambda: node.finish(0, code)
    assert node.run() == 0
    assert len(node.started) == 1


def test_a_worker_that_ends_with_0_and_without_a_word_is_lost(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    node.on_start = lambda spec: node.end(spec.rank, 0)
    assert node.run() == NO_PROGRESS_EXIT
    assert len(node.started) == 6
    ends = [event for event in node.others.posted if event.kind == "ended"]
    assert "without a word" in ends[0].cause


def test_a_line_that_workers_have_for_the_user_is_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = FakeNode(tmp_path)

    def wait() -> None:
        for rank in (0, 1):
            node.say(rank, "RUN/metrics.jsonl cannot be written")
        node.say(0, "step 4/4")
        node.on_wait = lambda: node.finish(0)

    node.on_wait = wait
    assert node.run(ranks=(0, 1)) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == ["holdfast: RUN/metrics.jsonl cannot be written", "holdfast: step 4/4"]


def test_a_newcomer_that_refuses_costs_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = FakeNode(tmp_path)
    reason = "rank 1: data: other tokens"

    def wait() -> None:
        node.on_wait = later
        for rank in (0, 1):
            node.tell_generation(rank, 1, BOTH)
            AcceptorFile(tmp_path, Identity(rank)).write(AcceptorState(1, frozenset(BOTH)))
        node.end(1, -9)

    def later() -> None:
        if len(node.started) == 3 and 1 in node.living:
            node.end(1, 2)
            node.on_wait = lambda: node.finish(0)

    node.on_wait = wait
    roll = tmp_path / "roll"
    known = {2: reason}
    assert node.run(ranks=(0, 1), roll=roll, failure=lambda _, code: known.get(code)) == 0
    assert node.killed == []
    assert [identity for _, identity in node.started] == [*BOTH, Identity(1, 1)]
    assert capsys.readouterr().err == f"holdfast: rank 1.1 is not let in: {reason}\n"


def test_a_node_that_cannot_join_does_not_end_the_run_of_the_others(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    node.on_start = lambda spec: node.end(spec.rank, 2)
    roll = tmp_path / "roll"
    assert node.run(ranks=(7,), founder=False, roll=roll, failure=lambda *_: "another lr") == 2
    assert Roll(roll).ended() is None


def test_a_worker_that_is_busy_for_too_long_is_killed_though_no_other_waits_for_it(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()
    records = Records(node, math.inf)
    records.of_1 = replace(records.of_1, busy="evaluate", busy_until_s=begin + 50.0)
    assert records.run() == 0
    ((moment, rank),) = node.killed
    assert rank == 1
    assert moment - begin - 60 == TICK_S
    assert node.others.posted[-1].cause.startswith("hung: it said that it would evaluate, and has")


@pytest.mark.mp
def test_a_worker_that_hangs_is_killed_though_nothing_can_be_learnt_of_it(tmp_path: Path) -> None:
    nowhere = tmp_path / "a file"
    nowhere.touch()
    node = FakeNode(tmp_path)
    records = Records(node, node.clock() + 1.0)
    assert records.run(incidents=nowhere / "incidents") == 0
    assert [rank for _, rank in node.killed] == [1]
    kinds = [event.kind for event in node.others.posted]
    assert kinds.index("suspected") < kinds.index("ended")
    (ended,) = [event for event in node.others.posted if event.kind == "ended"]
    assert ended.evidence.endswith("-rank-1-hung.json")
