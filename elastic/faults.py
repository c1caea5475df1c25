"""Faults on purpose, at a chosen step and phase, to show or test that a run survives.

A fault happens in the worker that it names, or to that worker's node. It is real (a signal, a held
lock, a flipped bit, dropped packets, a full disk), and it is recorded. A process that replaces
another does not repeat the faults of the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, assert_never

from msgspec import Meta

from holdfast.parallel.errors import ConfigError, HoldfastError, shown
from holdfast.parallel.files import open_added
from holdfast.parallel.reading import Count, of_kind, open_regular, parse_json
from holdfast.parallel.schedules import FAULTS, STEP_PHASES, FaultKind, StepPhase

logger = logging.getLogger("holdfast.elastic")

_MOST_BYTES = 1 << 20
"""The bytes of requests that are read at a time."""
_RULE = ("priority", "1", "blackhole")
"""The priority after the rule for the machine's own addresses, so its processes reach each
other."""
_SMALLEST_BYTES = 4096
_PERIOD_S = 0.06
"""The time from one stop of a throttled process to the next."""


class FaultError(HoldfastError):
    """A fault could not be caused."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in one worker."""

    fault: FaultKind
    rank: Count
    step: Count
    """The step, counted from 1; 0: the first in which the worker hears of it."""
    phase: StepPhase = "compute"
    """The phase at whose beginning the fault happens. "backward": when half of the step's backward
    passes are done. "micro-batch": when the first of them begins. "exchange": when its first
    gradient sums are on their way to an owner. "gather": when its first updated parameters are on
    their way to their holders. "prefetch": when parameters of later layers are on their way to it,
    if replicas share them. "fill": when state is first on its way to a newcomer, or to this rank,
    from that step on. "change": when ranks have changed before or within that step."""
    seconds: Annotated[float, Meta(ge=0, le=1e9)] = 60.0
    """The seconds for which the lock is held, the write lasts, the node is cut off, the disk is
    full, products are wrong or the process is slow, or by which a slow step is longer."""
    factor: Annotated[float, Meta(ge=1, le=1e6)] = 3.0
    """How many times as long everything takes ("throttle"), or what the processor computes in a
    micro-batch ("slow-compute"; 1: what was slow is as usual again)."""
    incarnation: Count = 0
    """The process of the rank: 0 is the one that the run began with."""


def fault_from_data(plain: dict[str, Any]) -> Fault:
    """The fault in JSON values.

    Raises:
        ConfigError: a kind, a phase or a field does not exist.
    """
    try:
        fault = Fault(**plain)
    except TypeError as error:
        raise ConfigError(f"a fault is not described well: {shown(str(error))}") from error
    if fault.fault not in FAULTS:
        raise ConfigError(
            f"fault {shown(fault.fault)} does not exist; choose one of {', '.join(FAULTS)}"
        )
    if fault.phase not in STEP_PHASES:
        raise ConfigError(
            f"phase {shown(fault.phase)} does not exist; choose one of {', '.join(STEP_PHASES)}"
        )
    try:
        return of_kind(plain, Fault)
    except ValueError as error:
        raise ConfigError(f"a fault is not described well: {shown(str(error))}") from error


def ask_for(path: Path, fault: Fault) -> None:
    """Add a fault to the file that a run's workers read at the beginning of each step.

    Raises:
        OSError: the file is a link or no regular file, or cannot be written.
    """
    descriptor = open_added(path)
    try:
        os.write(descriptor, f"{json.dumps(asdict(fault))}\n".encode())
    finally:
        os.close(descriptor)


def _is_due(fault: Fault, step: int) -> bool:
    return fault.step in (0, step) or (fault.phase == "fill" and fault.step < step)


@dataclass(frozen=True, slots=True)
class FaultEffects:
    """What faults do to a worker that only its training can do."""

    corrupt: Callable[[], None]
    """Flips a bit of this worker's state."""
    cut: Callable[[float], None]
    """Cuts this worker's node off for a number of seconds."""
    deadlock: Callable[[], None]
    """Waits for a message of another rank that never comes."""
    miscompute: Callable[[float], None]
    """Has bits flip in this worker's products for a number of seconds."""


class _Slowdown:
    """Makes the steps and micro-batches of a worker longer."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self.step_s = 0.0
        """The seconds by which every step is longer."""
        self._until: list[tuple[float, float]] = []
        """(the end in monotonic seconds, factor) of each fault that slows micro-batches."""
        self._used_s = 0.0
        """The processor time of the training thread when its micro-batch began."""

    def add(self, seconds: float, factor: float) -> None:
        """Have micro-batches take `factor` times as long, for some seconds; 1: as usual again."""
        if factor == 1:
            self._until.clear()
        self._until.append((time.monotonic() + seconds, factor))

    def begin_step(self) -> None:
        """Wait at the beginning of a step, if steps are longer."""
        if self.step_s:
            self._sleep(self.step_s)
        self._used_s = time.thread_time()

    def lengthen(self) -> None:
        """Make a micro-batch longer, by the processor time since the one before."""
        if not self._until:
            return
        now = time.monotonic()
        self._until = [pair for pair in self._until if pair[0] > now]
        factor = max((factor for _, factor in self._until), default=1.0)
        self._sleep((factor - 1) * (time.thread_time() - self._used_s))
        self._used_s = time.thread_time()


class FaultInjector:
    """Causes the faults of one worker.

    Its effects are passed in, so that tests can replace them.
    """

    def __init__(
        self,
        rank: int,
        incarnation: int,
        faults: Iterable[Fault],
        *,
        asked: Path,
        note: Callable[[Fault], None],
        effects: FaultEffects,
        disk: Path,
        signal_self: Callable[[int], None] = lambda number: os.kill(os.getpid(), number),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Only the worker's own faults are kept.

        Args:
            faults: the faults of the configuration.
            asked: the file of further faults that are asked for during the run; see `ask_for`.
            note: records a fault, before it happens.
            disk: the folder that checkpoints are written to.
            signal_self: sends a signal to this process.
        """
        self._identity = (rank, incarnation)
        self._waiting = [f for f in faults if (f.rank, f.incarnation) == self._identity]
        self._asked, self._note, self._effects, self._disk = asked, note, effects, disk
        self._signal_self = signal_self
        self._lock = threading.Lock()
        self._position = asked.stat().st_size if asked.exists() else 0
        self._slowdown = _Slowdown(sleep)

    def at(self, step: int, phase: StepPhase) -> None:
        """Cause the faults that are due. Called at the beginning of each phase.

        Args:
            step: the step, counted from 1.
        """
        if phase == "compute":
            self._read(step)
            self._slowdown.begin_step()
        elif phase == "micro-batch":
            self._slowdown.lengthen()
        with self._lock:  # state is on its way in another thread
            due = [f for f in self._waiting if f.phase == phase and _is_due(f, step)]
            self._waiting = [f for f in self._waiting if f not in due]
        for fault in due:
            self._note(replace(fault, step=fault.step or step))
            self._do(fault)

    def _read(self, step: int) -> None:
        try:
            with open_regular(self._asked, follow=False) as file:
                file.seek(self._position)
                lines = file.read(_MOST_BYTES).splitlines(keepends=True)
        except OSError:  # what lies there is no file in which faults can be asked for
            return
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._position += len(line)
            try:
                fault = fault_from_data(parse_json(line))
            except (ValueError, TypeError) as error:
                logger.warning("%s: a line asks for no fault: %s", self._asked, error)
                continue
            if (fault.rank, fault.incarnation) == self._identity:
                if fault.step < step:  # it was asked for as that step was under way
                    fault = replace(fault, step=0)
                with self._lock:
                    self._waiting.append(fault)

    def _do(self, fault: Fault) -> None:
        match fault.fault:
            case "kill":
                self._signal_self(signal.SIGKILL)
            case "stop":
                self._signal_self(signal.SIGSTOP)
            case "hold-lock":
                # A call through PyDLL keeps the interpreter's lock.
                ctypes.PyDLL(None).usleep(int(fault.seconds * 1e6))
            case "deadlock":
                self._effects.deadlock()
            case "stuck-disk":
                write_without_end(fault.seconds)
            case "slow":
                self._slowdown.step_s = fault.seconds
            case "slow-compute":
                self._slowdown.add(fault.seconds, fault.factor)
            case "throttle":
                throttle(os.getpid(), fault.seconds, fault.factor)
            case "exit":
                os._exit(1)
            case "corrupt-memory":
                self._effects.corrupt()
            case "corrupt-compute":
                self._effects.miscompute(fault.seconds)
            case "cut":
                self._effects.cut(fault.seconds)
            case "fill-disk":
                try:
                    fill_disk(self._disk, fault.seconds)
                except FaultError as error:
                    logger.error("no fault: %s", error)
            case unknown:
                assert_never(unknown)


def throttle(pid: int, seconds: float, factor: float) -> None:
    """Have a process stopped again and again, so that all it does takes longer. Does not wait.

    Another process does it, and has it go on at the end; it ends with the process.
    """
    stopped_s = _PERIOD_S * (1 - 1 / factor)
    rounds = round(seconds / _PERIOD_S)
    subprocess.Popen(
        [
            "sh",
            "-c",
            f"n=0; while [ $n -lt {rounds} ]; do kill -STOP {pid} || exit; sleep {stopped_s:.4f}; "
            f"kill -CONT {pid} || exit; sleep {_PERIOD_S - stopped_s:.4f}; n=$((n+1)); done",
        ],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def cut_network(seconds: float) -> None:
    """Drop the packets that this machine (or network namespace) sends; undone after `seconds`.

    Another process undoes it, even if the caller dies.

    Raises:
        FaultError: iproute2 or the right to change the network is missing.
    """
    undo = "; ".join(f"ip {family} rule del {' '.join(_RULE)}" for family in ("-4", "-6"))
    for family in ("-4", "-6"):
        try:
            subprocess.run(
                ["ip", family, "rule", "add", *_RULE], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            if family == "-6":
                break  # a machine without IPv6
            reason = (getattr(error, "stderr", "") or str(error)).strip()
            raise FaultError(
                f"the network cannot be cut off: {reason}; it takes root (CAP_NET_ADMIN) and "
                "iproute2"
            ) from error
    subprocess.Popen(
        ["sh", "-c", f"sleep {seconds:.3f}; {undo}"],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def write_without_end(seconds: float) -> None:
    """Write to what takes nothing, as to a disk that does not answer; return after `seconds`.

    It is a pipe of this process, so that nothing is left of it.
    """
    reader, writer = os.pipe()
    timer = threading.Timer(seconds, os.close, (reader,))
    timer.daemon = True
    timer.start()
    with contextlib.suppress(BrokenPipeError):
        while True:
            os.write(writer, bytes(_SMALLEST_BYTES))
    os.close(writer)


def fill_disk(folder: Path, seconds: float) -> None:
    """Fill a folder's file system for `seconds`, or until this process ends.

    Raises:
        FaultError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (held until the timer closes it)
    except OSError as error:
        raise FaultError(f"{folder} cannot be filled: {error.strerror}") from error
    found = os.statvfs(folder)
    taken, piece = 0, found.f_bfree * found.f_frsize
    while piece >= _SMALLEST_BYTES:
        try:
            os.posix_fallocate(file.fileno(), taken, piece)
            taken += piece
        except OSError:
            piece //= 2
    timer = threading.Timer(seconds, file.close)
    timer.daemon = True
    timer.start()
