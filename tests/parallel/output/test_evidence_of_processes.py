"""The stacks and the state of a process that cannot tell of itself, from real ones."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.parallel.output import (
    Evidence,
    evidence_name,
    memory_of,
    native_stacks,
    parsed_stacks,
    read_evidence,
    stacks_on_signal,
    threads_of,
    write_evidence,
)
from holdfast.parallel.output.evidence.stacks import ask_for_stacks

pytestmark = [pytest.mark.mp]


@contextlib.contextmanager
def process(stacks: Path, work: Callable[[], object]) -> Iterator[tuple[int, int]]:
    """A process that does some work for ever: its number and a pidfd of it."""
    pid = os.fork()
    if pid == 0:
        try:
            stacks_on_signal(stacks)
            work()
        finally:
            os._exit(0)
    descriptor = os.pidfd_open(pid)
    try:
        until(lambda: stacks.exists() and stacks.stat().st_size > 0)
        yield pid, descriptor
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(descriptor)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state_of(pid: int) -> str:
    return threads_of(pid)[0].state


def hold_the_lock() -> None:
    ctypes.PyDLL(None).sleep(600)


def write_to_a_full_pipe() -> None:
    _, writer = os.pipe()
    while True:
        os.write(writer, bytes(4096))


def compute() -> None:
    while True:
        pass


@pytest.mark.parametrize("work", [hold_the_lock, write_to_a_full_pipe, compute])
def test_the_stacks_come_whatever_the_main_thread_does(
    tmp_path: Path, work: Callable[[], None]
) -> None:
    with process(tmp_path / "stacks", work) as (pid, descriptor):
        until(lambda: "holdfast" in str(threads_of(pid)) or len(threads_of(pid)) == 2)
        until(lambda: work is compute or state_of(pid) == "S")

        def function() -> str:
            ask_for_stacks(pid, descriptor, is_stopped=False)
            time.sleep(0.02)
            stacks = parsed_stacks((tmp_path / "stacks").read_text())
            return stacks[0].frames[0].function if stacks and stacks[0].frames else ""

        until(lambda: function() == work.__name__)
        assert state_of(pid) == ("R" if work is compute else "S")  # and it goes on


def test_a_stopped_process_is_seen_where_it_stopped(tmp_path: Path) -> None:
    def stop_and_go_on() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        compute()

    with process(tmp_path / "stacks", stop_and_go_on) as (pid, descriptor):
        until(lambda: state_of(pid) == "T")
        ask_for_stacks(pid, descriptor, is_stopped=True)
        until(lambda: len(parsed_stacks((tmp_path / "stacks").read_text())) == 2)
        stacks = parsed_stacks((tmp_path / "stacks").read_text())
        assert stacks[0].name == "main thread"
        assert stacks[0].frames[0].function == "stop_and_go_on"


def test_a_wait_for_a_file_names_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with process(tmp_path / "stacks", lambda: os.open(pipe, os.O_WRONLY)) as (pid, _):
        until(lambda: threads_of(pid)[0].call.startswith("open"))
        assert threads_of(pid)[0].call.endswith(f" of {pipe}")
        assert memory_of(pid).resident_bytes > 1 << 20
    assert threads_of(pid) == ()
    assert memory_of(pid).resident_bytes == 0


@pytest.mark.skipif(not (shutil.which("gdb") or shutil.which("py-spy")), reason="no debugger")
def test_native_stacks_come_from_a_debugger_within_their_time(tmp_path: Path) -> None:
    with process(tmp_path / "stacks", hold_the_lock) as (pid, _):
        until(lambda: state_of(pid) == "S")
        text, note = native_stacks(pid, 60.0)
        assert "sleep" in text, note
        text, note = native_stacks(pid, 0.0)
        assert not text
        assert "took longer than 0.0 s" in note
        until(lambda: state_of(pid) == "S")


def test_a_dump_that_is_cut_off_gives_what_is_there() -> None:
    whole = (
        "main thread 0x0000000000000002\n"
        "Current thread 0x0000000000000001 [holdfast-stacks] (most recent call first):\n"
        '  File "a.py", line 3 in wait\n'
        "\n"
        "Thread 0x0000000000000002 (most recent call first):\n"
        '  File "b.py", line ??? in inner\n'
        '  File "b.py", line 9 in <module>\n'
    )
    main, other = parsed_stacks(whole)
    assert [(f.file, f.line, f.function) for f in main.frames] == [
        ("b.py", 0, "inner"),
        ("b.py", 9, "<module>"),
    ]
    assert (main.name, other.name) == ("main thread", "holdfast-stacks")
    for end in range(len(whole)):
        parsed_stacks(whole[:end])
    twice = whole + whole.partition("\n")[2].replace("b.py", "c.py")
    assert parsed_stacks(twice)[0].frames[0].file == "c.py"


def test_evidence_is_read_as_it_was_written(tmp_path: Path) -> None:
    evidence = Evidence(role="failed", rank=3, error="é" * 1000, device={"free": 1}, time=1.5)
    path = tmp_path / "incidents" / evidence_name("failed", "3", 0.0)
    assert path.name == "evidence-19700101T000000-rank-3-failed.json"
    write_evidence(path, evidence)
    assert read_evidence(path) == evidence
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"truncated|unexpected"):
        read_evidence(path)
