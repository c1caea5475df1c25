"""How an agent ends: its deadline and its exit code."""

from __future__ import annotations

import signal
from typing import cast

import pytest

from holdfast.elastic import WorkerSpec
from holdfast.launch.agent.shutdown import INTERRUPTED, Shutdown
from holdfast.launch.agent.worker_slot import WorkerSlot
from holdfast.parallel.errors import ConfigError, Stopped


def test_the_earliest_deadline_counts() -> None:
    shutdown = Shutdown()
    assert not shutdown.is_due(1e9)
    shutdown.within(30.0, 100.0, "the run has ended")
    shutdown.within(60.0, 101.0, "it is to be shut down")
    assert not shutdown.is_due(130.0)
    assert shutdown.is_due(130.1)
    assert shutdown.cause.endswith("the run has ended, and it has not ended within 30 s")
    shutdown.within(0.0, 110.0, "rank 1 has failed")
    assert shutdown.is_due(110.1)
    assert shutdown.cause == "its node ends: rank 1 has failed"  # it was given no time


def test_only_a_worker_that_its_agent_has_killed_is_said_to_be_killed_for_a_reason() -> None:
    slot = WorkerSlot(cast(WorkerSpec, None), killed_for="hung")
    assert slot.cause_of_end(-signal.SIGKILL) == "hung"
    assert slot.cause_of_end(3) == "exited with code 3"  # it came first
    assert slot.cause_of_end(-signal.SIGSEGV) == "killed by SIGSEGV"


@pytest.mark.parametrize(
    ("shutdown", "code"),
    [
        (Shutdown(), Stopped.exit_code),
        (Shutdown(failed_with=7), 7),
        (Shutdown(failed_with=7, draining=True), Stopped.exit_code),
        (Shutdown(failed_with=7, draining=True, finished=True), 0),
        (Shutdown(finished=True, code=INTERRUPTED), INTERRUPTED),
    ],
)
def test_a_decided_code_comes_first_then_the_end_of_the_run(shutdown: Shutdown, code: int) -> None:
    assert shutdown.exit_code == code


@pytest.mark.parametrize(
    ("shutdown", "over"),
    [
        (Shutdown(), False),
        (Shutdown(draining=True), False),
        (Shutdown(finished=True), True),
        (Shutdown(code=INTERRUPTED), True),
        (Shutdown(code=ConfigError.exit_code), True),
        (Shutdown(code=30), False),
    ],
)
def test_agents_report_for_workers_unless_the_run_is_over(shutdown: Shutdown, over: bool) -> None:
    assert shutdown.needs_no_report == over
