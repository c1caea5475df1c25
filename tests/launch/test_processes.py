"""The supervisor of child processes: rules with a fake system, promises with real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.launch.processes import (
    End,
    Supervisor,
    append_output,
    end_child,
    fork_child,
    on_signals,
)
from holdfast.parallel.output import unwind_when_told
from support.processes.fake_system import FakeSystem


@pytest.fixture
def signals_that_end() -> Iterator[None]:
    """SIGTERM and SIGHUP as a process has them at first, also where the tests run under nohup."""
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_each_end_is_told_once_with_its_code() -> None:
    system = FakeSystem()
    children = Supervisor([1, 2, 3], system=system)
    system.codes = {3: 0, 1: -9}
    assert children.wait() == [End(1, -9), End(3, 0)]
    assert children.pids == [2]
    assert children.wait(0.5) == []
    system.codes[2] = 7
    assert children.wait() == [End(2, 7)]
    assert len(children) == 0


def test_what_lives_at_the_deadline_is_killed_and_not_before() -> None:
    system = FakeSystem()
    children = Supervisor([1, 2], system=system)
    children.kill_at(2.0)
    assert children.wait(1.5) == []
    assert system.log == []
    assert children.wait(1.5) == []
    assert system.waited_s == [1.5, 0.5], "a wait is no longer than what is left to the deadline"
    system.codes[2] = 0
    assert children.wait() == [End(1, -signal.SIGKILL), End(2, 0)]


def test_a_deadline_that_is_put_off_kills_nothing() -> None:
    system = FakeSystem(time_s=5.0)
    children = Supervisor([1], system=system)
    children.kill_at(5.0)
    children.kill_at(None)
    assert children.wait(1.0) == []
    assert system.log == []


def test_signals_reach_every_living_child_and_no_other() -> None:
    system = FakeSystem(codes={2: 0})
    children = Supervisor([1, 2, 3], system=system)
    children.wait()
    system.log.clear()
    children.signal(signal.SIGTERM)
    assert system.log == [("SIGTERM", 1), ("SIGTERM", 3)]


def test_the_group_of_a_child_is_killed_before_its_number_is_free() -> None:
    system = FakeSystem(codes={1: 0})
    Supervisor([1], groups=True, system=system).wait()
    assert system.log == [("group", 1), ("reap", 1)]


@pytest.mark.mp
def test_a_wait_ends_when_another_descriptor_is_readable() -> None:
    reader, writer = os.pipe()
    try:
        children = Supervisor([fork_child(lambda: time.sleep(60) or 0)])
        os.write(writer, b"x")
        assert children.wait(also=[reader]) == []
        children.signal(signal.SIGKILL)
        assert [end.code for end in children.wait()] == [-signal.SIGKILL]
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.mp
@pytest.mark.parametrize("code", [0, 3])
def test_a_child_exits_with_what_its_body_returns(code: int) -> None:
    children = Supervisor([fork_child(lambda: code)])
    assert [end.code for end in children.wait()] == [code]


@pytest.mark.mp
def test_an_exception_in_a_child_is_code_1_and_leaves_its_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        append_output(tmp_path / "logs" / "child.log")
        raise ValueError("told in the log")

    with capfd.disabled():  # sys.stderr is descriptor 2, as it is outside of a test
        children = Supervisor([fork_child(body)])
        assert [end.code for end in children.wait()] == [1]
    assert "ValueError: told in the log" in (tmp_path / "logs" / "child.log").read_text()


@pytest.mark.mp
@pytest.mark.parametrize("outlives", [False, True])
def test_a_child_ends_with_its_parent_unless_it_outlives_it(outlives: bool) -> None:
    reader, writer = os.pipe()
    here, gone = os.pipe()

    def grandchild() -> int:
        os.close(gone)
        os.read(here, 1)  # returns when the test ends
        return 0

    def child() -> int:
        os.write(writer, str(fork_child(grandchild, outlives=outlives)).encode())
        return 0

    parent = Supervisor([fork_child(child)])
    pid = int(os.read(reader, 32))
    watched = os.pidfd_open(pid)
    try:
        assert [end.code for end in parent.wait()] == [0]
        ready, _, _ = select.select([watched], [], [], 0.5 if outlives else 30.0)
        assert (ready == []) == outlives
    finally:
        for descriptor in (reader, writer, here, gone, watched):
            os.close(descriptor)


def test_signals_go_to_the_call_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    heard: list[int] = []
    with on_signals(heard.append):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGUSR1, signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.mp
@pytest.mark.parametrize("stops", [False, True])
def test_a_child_that_does_not_end_in_time_is_killed(stops: bool) -> None:
    def body() -> int:
        if stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        return 0

    pid = fork_child(body)
    start = time.monotonic()
    patience_s = 0.3 if stops else 60.0
    end_child(pid, patience_s)
    assert (time.monotonic() - start > patience_s) == stops
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    end_child(pid, 60.0)  # it is gone already


@pytest.mark.mp
@pytest.mark.usefixtures("signals_that_end")
def test_a_child_does_not_unwind_the_work_of_its_parent() -> None:
    unwind_when_told()
    for number in (signal.SIGTERM, signal.SIGHUP):
        child = Supervisor([fork_child(lambda: time.sleep(60) or 0)])
        child.signal(number)
        assert [end.code for end in child.wait(30)] == [-number]


@pytest.mark.mp
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("signals_that_end")
def test_a_command_that_is_told_to_end_removes_what_it_made(tmp_path: Path, number: int) -> None:
    program = (
        "import os, tempfile\n"
        "from holdfast.parallel.files import scratch_folder\n"
        "from holdfast.parallel.output import begin_process, unwind_when_told\n"
        "begin_process()\n"
        "unwind_when_told()\n"
        f"with scratch_folder() as folder:\n    os.kill(os.getpid(), {int(number)})\n"
        "print('went on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
    assert list(tmp_path.iterdir()) == []
