"""How an agent ends: its deadline and its exit code."""

from __future__ import annotations

import pytest

from holdfast.launch.agent.shutdown import INTERRUPTED, Shutdown
from holdfast.parallel.errors import ConfigError, Stopped


def test_the_earliest_deadline_counts() -> None:
    shutdown = Shutdown()
    assert not shutdown.is_due(1e9)
    shutdown.within(30.0, now_s=100.0)
    shutdown.within(60.0, now_s=101.0)
    assert not shutdown.is_due(130.0)
    assert shutdown.is_due(130.1)
    shutdown.within(0.0, now_s=110.0)
    assert shutdown.is_due(110.1)


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
