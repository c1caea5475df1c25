"""The fork server: a process that stays single-threaded and can fork workers at any time.

The agent has threads (a store, a Lighthouse, watches), and a fork of a process with threads may
copy a lock that is never released. So the agent forks this process before it starts any thread, and
asks it for workers. Agent, fork server and workers are a chain in which each process dies with the
one before it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.elastic import WorkerSpec, send_message, worker_spec_from_data, worker_spec_to_data
from holdfast.launch.processes import Supervisor, append_output, fork_child

_PACKET_BYTES = 1 << 16

WorkerMain = Callable[[WorkerSpec, socket.socket], int]
"""The work of a worker, given its spec and its channel to the agent; returns its exit code."""


@dataclass(frozen=True, slots=True)
class Started:
    """A worker has been forked."""

    rank: int
    pid: int
    descriptor: int
    """A pidfd, to signal exactly this process; the receiver closes it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has ended, and the rest of its process group has been killed."""

    rank: int
    pid: int
    code: int
    """The exit code, or the negative number of the signal that killed it."""


class ForkServer:
    """The agent's side of the fork server process."""

    def __init__(self, main: WorkerMain) -> None:
        """Fork the fork server; the caller must not have started threads.

        Workers will call `main`.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gc.freeze()

        def body() -> int:
            self._control.close()
            return _serve(theirs, main)

        self.pid = fork_child(body)
        theirs.close()

    def fileno(self) -> int:
        """The descriptor that is readable when `receive` has a report."""
        return self._control.fileno()

    def start(self, spec: WorkerSpec, log: Path) -> socket.socket:
        """Ask for a worker; `Started` follows. Returns the agent's end of the channel to it.

        Args:
            log: the file that its output is appended to.
        Raises:
            BrokenPipeError: the fork server is gone.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = json.dumps({"spec": worker_spec_to_data(spec), "log": str(log)}).encode()
            socket.send_fds(self._control, [request], [theirs.fileno()])
        return ours

    def receive(self) -> Started | Ended | None:
        """Wait for the next report; None if the fork server, and so every worker, is gone."""
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
        """Kill the remaining workers and the fork server."""
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _serve(control: socket.socket, main: WorkerMain) -> int:
    """Fork workers on request, and report their ends, until the agent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    workers = Supervisor(groups=True)
    ranks: dict[int, int] = {}  # by process id
    try:
        while True:
            for end in workers.wait(also=[control.fileno()]):
                report = {"kind": "ended", "rank": ranks.pop(end.pid), "pid": end.pid}
                send_message(control, {**report, "code": end.code})
            if select.select([control], [], [], 0)[0]:
                packet, channels, _, _ = socket.recv_fds(control, _PACKET_BYTES, 1)
                if not packet:
                    break
                pid, rank = _fork(control, json.loads(packet), channels[0], main)
                ranks[pid] = rank
                started = json.dumps({"kind": "started", "rank": rank, "pid": pid}).encode()
                socket.send_fds(control, [started], [workers.add(pid)])
    except OSError:
        pass  # the agent is gone
    workers.kill_groups()
    return 0


def _fork(
    control: socket.socket, request: dict[str, Any], channel: int, main: WorkerMain
) -> tuple[int, int]:
    spec = worker_spec_from_data(request["spec"])

    def body() -> int:
        control.close()
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        append_output(Path(request["log"]))
        return main(spec, socket.socket(fileno=channel))

    pid = fork_child(body)
    os.close(channel)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    return pid, spec.rank
