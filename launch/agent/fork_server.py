"""The fork server: a process that stays single-threaded and forks workers at any time.

The agent has threads (a store, a Lighthouse, watches), and a fork of a process with threads may copy a lock
that nobody will ever release. So the agent forks this process before it starts any, and asks it for workers.
Agent, fork server and workers are a chain in which each dies with the one before it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from holdfast.elastic.channel import send_message
from holdfast.elastic.worker_spec import WorkerSpec, worker_spec_from_data, worker_spec_to_data

_PR_SET_PDEATHSIG = 1
_PACKET_BYTES = 1 << 16

WorkerMain = Callable[[WorkerSpec, socket.socket], int]
"""What a worker does with its spec and its channel to the agent; returns its exit code."""


@dataclass(frozen=True, slots=True)
class Started:
    """A worker has been forked."""

    rank: int
    pid: int
    descriptor: int
    """A pidfd, to signal exactly this process; the receiver closes it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has ended, and what it left in its process group has been killed."""

    rank: int
    pid: int
    code: int
    """Its exit code, or the negative number of the signal that killed it."""


class ForkServer:
    """The agent's side of the fork server process."""

    def __init__(self, main: WorkerMain) -> None:
        """Fork the fork server; the caller must not have started threads. Workers will call `main`."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()
        agent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            _serve(theirs, main, agent)
        theirs.close()

    def fileno(self) -> int:
        """Readable when `receive` has something."""
        return self._control.fileno()

    def start(self, spec: WorkerSpec, log: Path) -> socket.socket:
        """Ask for a worker; `Started` follows. Returns the agent's end of the channel to it.

        Args:
            log: where its output is appended.
        Raises:
            BrokenPipeError: the fork server is gone.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = json.dumps({"spec": worker_spec_to_data(spec), "log": str(log)}).encode()
            socket.send_fds(self._control, [request], [theirs.fileno()])
        return ours

    def receive(self) -> Started | Ended | None:
        """The next report; None if the fork server, and so every worker, is gone. Waits for one."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, _PACKET_BYTES, 1)
        except ConnectionError:
            return None
        if not packet:
            return None
        report = json.loads(packet)
        if report["kind"] == "started":
            return Started(report["rank"], report["pid"], descriptors[0])
        return Ended(report["rank"], report["pid"], report["code"])

    def close(self) -> None:
        """Kill what is left of the workers, and the fork server."""
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def die_with(parent: int) -> None:
    """Have this process killed when `parent`, which forked it from its main thread, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _serve(control: socket.socket, main: WorkerMain, agent: int) -> NoReturn:
    """The fork server's life."""
    die_with(agent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    workers: dict[int, tuple[int, int]] = {}  # pidfd -> pid, rank
    try:
        while True:
            ready, _, _ = select.select([control.fileno(), *workers], [], [])
            for descriptor in ready:
                if descriptor in workers:
                    _reap(control, descriptor, *workers.pop(descriptor))
            if control.fileno() in ready:
                packet, lines, _, _ = socket.recv_fds(control, _PACKET_BYTES, 1)
                if not packet:
                    break
                request = json.loads(packet)
                pid, rank = _fork(control, request, lines[0], main)
                descriptor = os.pidfd_open(pid)
                workers[descriptor] = (pid, rank)
                report = json.dumps({"kind": "started", "rank": rank, "pid": pid}).encode()
                socket.send_fds(control, [report], [descriptor])
    except OSError:
        pass  # the agent is gone
    for pid, _ in workers.values():
        _kill_group(pid)
    os._exit(0)


def _reap(control: socket.socket, descriptor: int, pid: int, rank: int) -> None:
    os.close(descriptor)
    _kill_group(pid)  # before its number is free for another process
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    send_message(control, {"kind": "ended", "rank": rank, "pid": pid, "code": code})


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fork(
    control: socket.socket, request: dict[str, Any], channel: int, main: WorkerMain
) -> tuple[int, int]:
    spec = worker_spec_from_data(request["spec"])
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        control.close()
        _work(spec, socket.socket(fileno=channel), Path(request["log"]), main, server)
    os.close(channel)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    return pid, spec.rank


def _work(
    spec: WorkerSpec, channel: socket.socket, log: Path, main: WorkerMain, server: int
) -> NoReturn:
    """A worker's life."""
    code = 1
    try:
        die_with(server)
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        code = main(spec, channel)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
