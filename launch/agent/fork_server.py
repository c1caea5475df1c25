"""The fork server: a process that stays single-threaded and can fork workers at any time.

The agent has threads (a store, a Lighthouse, watches), and a fork of a process with threads may
copy a lock that is never released. So the agent forks this process before it starts any thread, and
asks it for workers. Agent, fork server and workers are a chain in which each process dies with the
one before it (PR_SET_PDEATHSIG).

Agent and fork server also watch each other, as each would otherwise wait for the other for ever.
One that a signal stops, or that does not run, is killed by the other; its node is lost with it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.elastic import FairClock, WorkerSpec
from holdfast.launch.agent.liveness import is_stopped, silence, starved_s
from holdfast.launch.processes import Supervisor, append_output, end_child, fork_child
from holdfast.parallel.output import name_process
from holdfast.parallel.reading import decode_json

logger = logging.getLogger("holdfast.agent")

_PACKET_BYTES = 1 << 18
_LOOK_S = 0.2
_END_S = 10.0
"""Seconds that the fork server may take to end once it is told to."""
STUCK_S = 60.0
"""The seconds beyond its patience for which a process that no signal has stopped may not run: the
disk of its log may be slow."""
_BEAT = struct.Struct("<d")

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


class _Request(msgspec.Struct, frozen=True):
    """The agent asks for a worker."""

    spec: WorkerSpec
    log: str


class _Report(msgspec.Struct, frozen=True):
    """A worker has been forked, if a descriptor comes with it, or else has ended."""

    rank: int
    pid: int
    code: int = 0


class MutualWatch:
    """One side of the watch that agent and fork server keep over each other.

    Each writes the time at which it last ran to memory that both have.
    """

    def __init__(self, page: mmap.mmap, side: int, *, patience_s: float) -> None:
        """Watch from one side of a page of two times; neither is watched before its first beat.

        Args:
            patience_s: seconds that a signal may stop the other side.
        """
        self._page, self._at, self._patience_s = page, side * _BEAT.size, patience_s
        self._fair = FairClock()
        self._starved_s = 0.0

    def beat(self) -> None:
        """Note that this side runs."""
        _BEAT.pack_into(self._page, self._at, time.monotonic())

    def rest(self) -> None:
        """Stop being watched."""
        _BEAT.pack_into(self._page, self._at, 0.0)

    def kill_if_stopped(self, pid: int) -> None:
        """Kill the other side if a signal has stopped it, because it could not end by itself."""
        if is_stopped(pid):
            os.kill(pid, signal.SIGKILL)

    def silence(self, pid: int) -> str | None:
        """The reason why the other side, which is process `pid`, counts as stopped or hung."""
        now_starved_s = starved_s(pid)
        self._fair.look(now_starved_s - self._starved_s if self._starved_s else 0.0)
        self._starved_s = now_starved_s
        (beat_s,) = _BEAT.unpack_from(self._page, _BEAT.size - self._at)
        limit_s = self._patience_s
        return silence(pid, beat_s or None, self._fair, stopped_s=limit_s, hung_s=limit_s + STUCK_S)


class ForkServer:
    """The agent's side of the fork server process."""

    def __init__(self, main: WorkerMain, *, patience_s: float = 10.0) -> None:
        """Fork the fork server; the caller must not have started threads.

        Workers will call `main`.

        Args:
            patience_s: seconds that a signal may stop the agent or the fork server.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        page = mmap.mmap(-1, 2 * _BEAT.size)
        self._watch = MutualWatch(page, 0, patience_s=patience_s)
        gc.freeze()

        def body() -> int:
            self._control.close()
            return _serve(theirs, main, MutualWatch(page, 1, patience_s=patience_s))

        self.pid = fork_child(body)
        theirs.close()

    def look(self) -> str | None:
        """Tell the fork server that the agent runs, and kill the fork server if it does not.

        Returns:
            The reason if it was killed; `receive` soon returns None.
        """
        self._watch.beat()
        cause = self._watch.silence(self.pid)
        if cause is not None:
            os.kill(self.pid, signal.SIGKILL)
        return cause

    def rest(self) -> None:
        """Tell the fork server that the agent has no more work, and may wait for others."""
        self._watch.rest()

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
            request = msgspec.json.encode(_Request(spec, str(log)))
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
        report = decode_json(packet, _Report)
        if descriptors:
            return Started(report.rank, report.pid, descriptors[0])
        return Ended(report.rank, report.pid, report.code)

    def close(self) -> None:
        """Kill the remaining workers and the fork server."""
        self._control.close()
        self._watch.kill_if_stopped(self.pid)
        end_child(self.pid, _END_S)


def _serve(control: socket.socket, main: WorkerMain, watch: MutualWatch) -> int:
    """Fork workers on request, and report their ends, until the agent is gone.

    An agent that does not run any more is killed, after the workers that it cannot watch.
    """
    name_process("forks")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    workers = Supervisor(groups=True)
    ranks: dict[int, int] = {}  # by process id
    try:
        while True:
            watch.beat()
            if (cause := watch.silence(os.getppid())) is not None:
                workers.kill_groups()
                logger.error("the agent is killed, and this node is lost: %s", cause)
                os.kill(os.getppid(), signal.SIGKILL)
            for end in workers.wait(_LOOK_S, also=[control.fileno()]):
                ended = _Report(ranks.pop(end.pid), end.pid, end.code)
                control.send(msgspec.json.encode(ended))
            if select.select([control], [], [], 0)[0]:
                packet, channels, _, _ = socket.recv_fds(control, _PACKET_BYTES, 1)
                if not packet:
                    break
                pid, rank = _fork(control, decode_json(packet, _Request), channels[0], main)
                ranks[pid] = rank
                started = msgspec.json.encode(_Report(rank, pid))
                socket.send_fds(control, [started], [workers.add(pid)])
    except OSError:
        pass  # the agent is gone
    workers.kill_groups()
    return 0


def _fork(
    control: socket.socket, request: _Request, channel: int, main: WorkerMain
) -> tuple[int, int]:
    spec = request.spec

    def body() -> int:
        control.close()
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        append_output(Path(request.log))
        return main(spec, socket.socket(fileno=channel))

    pid = fork_child(body)
    os.close(channel)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    return pid, spec.rank
