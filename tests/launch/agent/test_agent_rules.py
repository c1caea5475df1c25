"""When an agent starts, kills and gives up its workers: with a clock and workers of the test's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from holdfast.elastic.generation import Identity
from holdfast.elastic.hang import Wait
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.launch.agent.liveness import LEFT_OUT_S
from holdfast.launch.agent.restarts import NO_PROGRESS_EXIT, RestartPolicy
from support.processes.fake_node import FakeNode

BOTH = (Identity(0), Identity(1))
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
            node.end(0, 0)

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
            node.end(0, 0)

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

    assert node.run(founder=False, is_over=is_over) == 0
    assert len(asked) == pytest.approx(11, abs=2)  # twice a second
    assert [rank for _, rank in node.killed] == [0]


def test_a_worker_that_hangs_is_killed_once_all_waits_have_had_time_to_arrive(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()

    def waits(spec: WorkerSpec) -> Wait | None:
        late = node.clock() > begin + 10 and spec.identity == Identity(0)
        return Wait(frozenset({1}), 10.0, "a reduction") if late else None

    def script() -> None:
        if not node.others.generation:
            node.tell_generation(0, 1, BOTH)
            node.tell_generation(1, 1, BOTH)
        if node.killed and 0 in node.living:
            node.end(0, 0)

    node.on_wait = script
    assert node.run(ranks=(0, 1), respawn=False, exit_s=1.0, waits=waits) == 0
    ((moment, rank),) = node.killed
    assert rank == 1
    assert 10 < moment - begin < 12
    causes = [event.cause for event in node.others.posted]
    assert causes[0] == "has waited 10.0 s for rank 1 (a reduction)"
    assert causes[1] == "hung: rank 0 has waited 10.0 s for rank 1 (a reduction)"
