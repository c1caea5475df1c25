"""Child processes: they end with their parent, are watched by pidfd, and are killed in time.

Nothing here knows the work of a child. `System` has the needed parts of the operating system, so
that tests of the rules need no process. Local.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from holdfast.parallel.files import open_added

_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""The signals that a process passes on to its children."""


@dataclass(frozen=True, slots=True)
class End:
    """A child has ended."""

    pid: int
    code: int
    """The exit code, or the negative number of the signal that killed it."""


class System(Protocol):
    """The parts of the operating system and the clock that a supervisor uses."""

    def now_s(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def open(self, pid: int) -> int:
        """Open a descriptor of a child, which is readable once the child has ended."""
        ...

    def wait(self, descriptors: Sequence[int], timeout_s: float | None) -> list[int]:
        """Wait at most `timeout_s` for the first readable descriptor. Returns the readable ones."""
        ...

    def signal(self, descriptor: int, number: int) -> None:
        """Send a signal to a child; no effect if it has ended."""
        ...

    def kill_group(self, pid: int) -> None:
        """Send SIGKILL to every process in the group that a child leads."""
        ...

    def reap(self, descriptor: int, pid: int) -> int:
        """Close the descriptor of an ended child, and free its process id.

        Returns its exit code.
        """
        ...


class Linux:
    """The operating system itself."""

    def now_s(self) -> float:
        return time.monotonic()

    def open(self, pid: int) -> int:
        return os.pidfd_open(pid)

    def wait(self, descriptors: Sequence[int], timeout_s: float | None) -> list[int]:
        return select.select(descriptors, [], [], timeout_s)[0]

    def signal(self, descriptor: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)

    def kill_group(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def reap(self, descriptor: int, pid: int) -> int:
        os.close(descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Supervisor:
    """The living children of this process.

    One thread uses it; its signal handlers may call `signal`.
    """

    def __init__(
        self, pids: Sequence[int] = (), *, groups: bool = False, system: System | None = None
    ) -> None:
        """Watch children.

        Args:
            groups: whether each child leads a process group, none of which may outlive it.
        """
        self._system: System = Linux() if system is None else system
        self._groups = groups
        self._children: dict[int, int] = {}
        self._kill_at_s: float | None = None
        self.has_killed = False
        """Whether it has sent SIGKILL to its children."""
        for pid in pids:
            self.add(pid)

    def __len__(self) -> int:
        """The number of living children."""
        return len(self._children)

    @property
    def pids(self) -> list[int]:
        return list(self._children.values())

    def add(self, pid: int) -> int:
        """Watch one more child. Returns its pidfd, which is closed when the child ends."""
        descriptor = self._system.open(pid)
        self._children[descriptor] = pid
        return descriptor

    def signal(self, number: int) -> None:
        """Send a signal to all children."""
        self.has_killed |= number == signal.SIGKILL
        for descriptor in list(self._children):
            self._system.signal(descriptor, number)

    def kill_at(self, moment_s: float | None) -> None:
        """Have `wait` kill the living children from this time of the clock on; None: never."""
        self._kill_at_s = moment_s

    def wait(self, timeout_s: float | None = None, also: Sequence[int] = ()) -> list[End]:
        """Wait until a child ends, a descriptor of `also` is readable, or the time is over.

        Returns:
            The children that have ended, in the order in which they were added.
        """
        if self._kill_at_s is not None:
            left_s = self._kill_at_s - self._system.now_s()
            if left_s <= 0:
                self.signal(signal.SIGKILL)
            else:
                timeout_s = left_s if timeout_s is None else min(left_s, timeout_s)
        ready = self._system.wait([*also, *self._children], timeout_s)
        return [self._reap(found) for found in list(self._children) if found in ready]

    def kill_groups(self) -> None:
        """Send SIGKILL to the process groups of all children."""
        for pid in self._children.values():
            self._system.kill_group(pid)

    def _reap(self, descriptor: int) -> End:
        pid = self._children.pop(descriptor)
        if self._groups:
            self._system.kill_group(pid)  # before its number is free for another process
        return End(pid, self._system.reap(descriptor, pid))


def fork_child(body: Callable[[], int], *, outlives: bool = False) -> int:
    """Fork a process that calls `body` and exits with its result. Returns the process id.

    An exception in the child is printed with its traceback and makes the exit code 1. Call it in
    the main thread of a process without other threads.

    Args:
        outlives: whether the child outlives this process; otherwise the kernel kills it with its
            parent.
    """
    _flush()
    parent = os.getpid()
    # A handler of this process that ran in the child would unwind this process's work there.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        pid = os.fork()
        if pid == 0:
            for number in _ENDING:
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            _live(body, None if outlives else parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def _live(body: Callable[[], int], parent: int | None) -> NoReturn:
    code = 1
    try:
        if parent is not None:
            die_with(parent)
        code = body()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        import traceback

        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()
    finally:
        _flush()
        os._exit(code)
    raise AssertionError


def _flush() -> None:
    """Write the text that waits for the standard streams, so that no child writes it again."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which forked it in its main thread, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def end_child(pid: int, patience_s: float) -> None:
    """Wait for a child to end by itself, and kill it if that takes longer than `patience_s`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([descriptor], [], [], patience_s)[0]:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    finally:
        os.close(descriptor)


def append_output(path: os.PathLike[str]) -> None:
    """Append this process's standard output and errors to a file, whose folder is made.

    They are left out if the file cannot be opened.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        output = open_added(Path(path))
    except OSError:
        output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


@contextlib.contextmanager
def on_signals(
    call: Callable[[int], None], numbers: Sequence[signal.Signals] = PASSED_ON
) -> Iterator[None]:
    """Call `call(number)` for these signals during the block, in place of their handlers."""

    def handle(number: int, _: FrameType | None) -> None:
        call(number)

    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
