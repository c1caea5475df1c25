"""How long a node goes on without a part in the run: with a clock of the test's."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.elastic import Roll, RunEnd, WorkerSpec
from holdfast.elastic.generation import Identity
from support.processes.fake_node import FakeNode

BOTH = (Identity(0), Identity(1))


def test_a_node_without_a_part_in_the_run_ends_with_3_after_the_stated_time(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()

    def script() -> None:
        if node.clock() > begin + 20 and not node.others.generation:
            node.tell_generation(0, 1, BOTH[:1])
        elif node.clock() > begin + 200 and node.others.generation == 1:
            node.tell(0, "agreeing")
            node.others.generation = 2

    node.on_wait = script
    assert node.run(apart_s=60.0) == 3
    ((moment, rank),) = node.killed
    assert rank == 0
    assert moment - begin == pytest.approx(260, abs=1)  # 180 s in a generation do not count


def test_replaced_workers_do_not_begin_the_time_anew(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    begin = last = node.clock()

    def script() -> None:
        nonlocal last
        if node.living and node.clock() > last + 25:
            last = node.clock()
            node.end(0, 3)

    node.on_wait = script
    assert node.run(apart_s=60.0) == 3
    assert node.clock() - begin == pytest.approx(60, abs=1)


def test_a_worker_that_waits_while_others_train_may_wait(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    begin = node.clock()

    def script() -> None:
        if node.clock() > begin + 500:
            node.finish(0)
        else:
            node.tell(0, "queued")

    node.on_wait = script
    assert node.run(apart_s=60.0, founder=False) == 0


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_node_that_was_cut_off_ends_with_the_run_and_with_its_code(
    tmp_path: Path, code: int
) -> None:
    node, roll = FakeNode(tmp_path), tmp_path / "roll"
    begin = node.clock()

    def script() -> None:
        if not node.others.generation:
            node.tell_generation(0, 1, BOTH)
        elif node.clock() > begin + 5 and node.others.generation == 1:
            Roll(roll).end(RunEnd(code, "the reason"))  # does not matter while it trains
            node.others.generation = 2
        elif node.clock() > begin + 30 and node.others.generation == 2:
            node.others.generation = 3
            node.tell(0, "agreeing")

    node.on_wait = script
    assert node.run(roll=roll) == code
    ((moment, _),) = node.killed
    assert 30 < moment - begin < 32


def test_the_end_of_a_run_is_written_for_nodes_that_are_cut_off(tmp_path: Path) -> None:
    node, roll = FakeNode(tmp_path), tmp_path / "roll"
    node.on_start = lambda spec: node.finish(spec.rank)
    assert node.run(roll=roll) == 0
    assert Roll(roll).ended() == RunEnd(0)


def failing(node: FakeNode, codes: list[int]) -> None:
    left = iter(codes)

    def start(spec: WorkerSpec) -> None:
        end = node.end if (code := next(left)) else node.finish
        end(spec.rank, code)

    node.on_start = start


def test_the_same_failure_of_a_worker_and_its_replacement_ends_the_run(tmp_path: Path) -> None:
    node, roll = FakeNode(tmp_path), tmp_path / "roll"
    failing(node, [1, 1, 1, 1, 1, 1])
    assert node.run(failure=lambda rank, code: f"rank {rank}: no gradient", roll=roll) == 1
    assert [identity for _, identity in node.started] == [Identity(0), Identity(0, 1)]
    assert Roll(roll).ended() == RunEnd(1, "rank 0: no gradient")


def test_the_same_failure_costs_no_node_whose_other_workers_train(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)

    def script() -> None:
        if not node.others.generation:
            node.tell_generation(0, 1, BOTH)
        elif len([1 for _, identity in node.started if identity.rank == 1]) < 4:
            if 1 in node.living:
                node.end(1, 1)
        elif 0 in node.living:
            node.finish(0)

    node.on_wait = script
    reason = "no port is free"
    assert node.run(ranks=(0, 1), failure=lambda rank, code: reason if code else None) == 0


@pytest.mark.parametrize("others", [True, False])
def test_the_same_failure_later_ends_a_node_and_the_run_only_if_no_other_trains(
    tmp_path: Path, others: bool
) -> None:
    node, roll = FakeNode(tmp_path), tmp_path / "roll"

    def script() -> None:
        if not node.others.generation:
            node.tell_generation(0, 1, BOTH if others else BOTH[:1])
        elif node.living:
            node.end(0, 1)

    node.on_wait = script
    assert node.run(failure=lambda rank, code: "no port is free", roll=roll) == 1
    assert [identity for _, identity in node.started] == [Identity(0), Identity(0, 1)]
    assert Roll(roll).ended() == (None if others else RunEnd(1, "no port is free"))
    assert node.others.over != others  # the others get time to go on, and nobody else


def test_a_refusal_ends_the_run_at_once_on_every_node(tmp_path: Path) -> None:
    node, roll = FakeNode(tmp_path), tmp_path / "roll"
    failing(node, [2])
    assert node.run(failure=lambda rank, code: "model.x = 1: too small", roll=roll) == 2
    assert Roll(roll).ended() == RunEnd(2, "model.x = 1: too small")


def test_other_failures_and_failures_after_progress_are_replaced(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    failing(node, [1, 1, 1, 0])
    reasons = iter(["one", "two", "one"])
    assert node.run(failure=lambda rank, code: next(reasons) if code else None) == 0
    assert len(node.started) == 4


def test_divergence_ends_the_run_on_every_node(tmp_path: Path) -> None:
    node, roll = FakeNode(tmp_path), tmp_path / "roll"
    failing(node, [4])
    assert node.run(failure=lambda rank, code: f"rank {rank}: diverged", roll=roll) == 4
    assert Roll(roll).ended() == RunEnd(4, "rank 0: diverged")
