"""Faults on purpose, at a chosen step and phase, to show or test that a run survives.

A fault happens in the worker that it names, or to that worker's node, is real (a signal, a held
lock, a flipped bit, packets dropped, a disk without room), and is written down. A process that
replaces another does not repeat the faults that the first was told of.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, assert_never

from holdfast.elastic.node_faults import FaultError, fill_disk
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.faults import FAULTS, FaultKind
from holdfast.parallel.step_phases import STEP_PHASES, StepPhase

logger = logging.getLogger("holdfast.elastic")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in one worker."""

    fault: FaultKind
    rank: int
    step: int
    """Counted from 1."""
    phase: StepPhase = "compute"
    """The fault comes at its beginning; "backward": when half of the step's backward passes are
    done; "fill": when state is on its way to a newcomer, or to this rank, for the first time
    from that step on; "change": when ranks have changed before that step, or within it."""
    seconds: float = 60.0
    """How long the lock is held, the node is cut off or the disk is full, or by how much a slow
    step is longer."""
    incarnation: int = 0
    """Which process of the rank: 0 is the one that the run began with."""


def fault_from_data(plain: dict[str, Any]) -> Fault:
    """A fault from JSON values.

    Raises:
        ConfigError: a kind, a phase or a field that does not exist.
    """
    try:
        fault = Fault(**plain)
    except TypeError as error:
        raise ConfigError(f"a fault is not described well: {error}") from error
    if fault.fault not in FAULTS:
        raise ConfigError(
            f"fault {fault.fault!r} does not exist; choose one of {', '.join(FAULTS)}"
        )
    if fault.phase not in STEP_PHASES:
        raise ConfigError(
            f"phase {fault.phase!r} does not exist; choose one of {', '.join(STEP_PHASES)}"
        )
    return fault


def ask_for(path: Path, fault: Fault) -> None:
    """Add a fault to those that a run's workers read from `path` at the beginning of each step."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(asdict(fault))}\n".encode())


def _is_due(fault: Fault, step: int) -> bool:
    return fault.step == step or (fault.phase == "fill" and fault.step < step)


class FaultInjector:
    """The faults of one worker. What they touch is passed in, so that tests do not suffer."""

    def __init__(
        self,
        rank: int,
        incarnation: int,
        faults: Iterable[Fault],
        *,
        asked: Path,
        note: Callable[[Fault], None],
        corrupt: Callable[[], None],
        cut: Callable[[float], None],
        disk: Path,
        signal_self: Callable[[int], None] = lambda number: os.kill(os.getpid(), number),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Local.

        Args:
            faults: of the configuration.
            asked: where further ones are asked for while the run goes on; see `ask_for`.
            note: writes a fault down, before it happens.
            corrupt: flips a bit of this worker's state.
            cut: cuts this worker's node off for so many seconds.
            disk: the folder that checkpoints are written to.
            signal_self: sends a signal to this process.
        """
        self._identity = (rank, incarnation)
        self._waiting = [f for f in faults if (f.rank, f.incarnation) == self._identity]
        self._asked, self._note, self._corrupt = asked, note, corrupt
        self._cut, self._disk = cut, disk
        self._signal_self, self._sleep = signal_self, sleep
        self._lock = threading.Lock()
        self._position = asked.stat().st_size if asked.exists() else 0
        self._slow_s = 0.0

    def at(self, step: int, phase: StepPhase) -> None:
        """Do what is due. Called at the beginning of each phase.

        Args:
            step: counted from 1.
        """
        if phase == "compute":
            self._read()
            if self._slow_s:
                self._sleep(self._slow_s)
        with self._lock:  # state is on its way in another thread
            due = [f for f in self._waiting if f.phase == phase and _is_due(f, step)]
            self._waiting = [f for f in self._waiting if f not in due]
        for fault in due:
            self._note(fault)
            self._do(fault)

    def _read(self) -> None:
        if not self._asked.exists() or self._asked.stat().st_size <= self._position:
            return
        with self._asked.open("rb") as file:
            file.seek(self._position)
            lines = file.readlines()
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._position += len(line)
            fault = fault_from_data(json.loads(line))
            if (fault.rank, fault.incarnation) == self._identity:
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
            case "slow":
                self._slow_s = fault.seconds
            case "exit":
                os._exit(1)
            case "corrupt-memory":
                self._corrupt()
            case "cut":
                self._cut(fault.seconds)
            case "fill-disk":
                try:
                    fill_disk(self._disk, fault.seconds)
                except FaultError as error:
                    logger.error("no fault: %s", error)
            case unknown:
                assert_never(unknown)
