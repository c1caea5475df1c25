"""When a run saves is a value: no process, no clock, no disk."""

from __future__ import annotations

import pytest

from holdfast.trainer.saves.save_policy import RETRY_S, SaveDecision, SavePolicy
from support.runs.small_runs import make_config

NOTHING, DISK, MEMORY, SKIPPED = SaveDecision


def _decisions(policy: SavePolicy, steps: int, *, busy: bool = False) -> list[SaveDecision]:
    return [
        policy.decide(step, asked=False, stopping=False, busy=busy) for step in range(1, steps + 1)
    ]


def test_every_so_many_steps_to_the_disk_and_to_memory() -> None:
    policy = SavePolicy(last_step=100, every=4, memory_every=2)
    assert _decisions(policy, 6) == [NOTHING, MEMORY, NOTHING, DISK, NOTHING, MEMORY]


def test_a_policy_of_nothing_saves_when_asked_alone() -> None:
    policy = SavePolicy(last_step=100)
    assert set(_decisions(policy, 50)) == {NOTHING}
    assert policy.decide(7, asked=True, stopping=False, busy=False) is DISK
    assert policy.decide(7, asked=False, stopping=True, busy=False) is DISK


def test_a_busy_rank_leaves_out_what_nobody_asked_for() -> None:
    policy = SavePolicy(last_step=6, every=2, memory_every=3, skips_when_busy=True)
    wanted = [NOTHING, SKIPPED, SKIPPED, SKIPPED, NOTHING]
    assert _decisions(policy, 5, busy=True) == wanted
    assert policy.decide(6, asked=False, stopping=False, busy=True) is NOTHING, (
        "the last step is saved by the end of the run, so it is not reported as skipped"
    )
    assert policy.decide(3, asked=True, stopping=False, busy=True) is DISK
    assert policy.decide(3, asked=False, stopping=True, busy=True) is DISK


def test_a_policy_that_waits_saves_though_one_is_under_way() -> None:
    policy = SavePolicy(last_step=6, every=2)
    assert _decisions(policy, 4, busy=True) == [NOTHING, DISK, NOTHING, DISK]


@pytest.mark.parametrize(
    ("every", "now", "due"), [(0.0, 1e9, False), (5.0, 104.9, False), (5.0, 105.0, True)]
)
def test_a_save_is_due_after_so_many_seconds(every: float, now: float, due: bool) -> None:
    assert SavePolicy(last_step=9, every_seconds=every).is_overdue(now, 100.0) is due


def test_the_configuration_says_the_policy() -> None:
    checkpoint = {"every": 3, "every_seconds": 9.0, "memory_every": 2, "policy": "skip"}
    config = make_config(train={"steps": 12}, checkpoint=checkpoint)
    assert SavePolicy.of(config) == SavePolicy(12, 3, 9.0, 2, True)
    assert not SavePolicy.of(make_config(checkpoint={"policy": "wait"})).skips_when_busy


def test_a_save_that_failed_is_tried_again_after_a_minute() -> None:
    policy = SavePolicy(last_step=9, every=1000)
    assert not policy.is_overdue(200.0, 0.0)
    assert not policy.is_overdue(100.0 + RETRY_S - 0.1, 0.0, 100.0)
    assert policy.is_overdue(100.0 + RETRY_S, 0.0, 100.0)
