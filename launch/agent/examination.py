"""The look at a worker that hangs, before it is killed, and at one that waits for such a worker.

A worker that hangs is first asked, which works while its interpreter runs; then its stacks are had
by a signal, which works while anything of it runs. One that a signal has stopped must be let run
for that, for milliseconds, and is stopped again. That is as safe as a kill at another moment: it
is a member that was slow, or one that was cut off and that the others have gone on without. One
that waits is only asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from holdfast.elastic import Identity, WorkerSpec
from holdfast.launch.agent.liveness import is_stopped, record_of
from holdfast.parallel.comm import busy_text, last_operations
from holdfast.parallel.output import (
    Evidence,
    ThreadStack,
    ask_for_stacks,
    evidence_name,
    memory_of,
    native_stacks,
    parsed_stacks,
    read_evidence,
    threads_of,
    write_evidence,
)
from holdfast.parallel.reading import read_regular

logger = logging.getLogger("holdfast.agent")

LOOK_S = 1.0
"""Seconds that a look at a worker takes at most."""
_ANSWER_S = 0.25
_SIGNAL_S = 0.35
_LEAST_S = 0.2
"""Seconds below which no debugger is started."""
_POLL_S = 0.005
_MOST_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Subject:
    """A worker that is looked at."""

    spec: WorkerSpec
    pid: int
    descriptor: int
    """A pidfd of its own, which the end of the look closes."""
    is_hung: bool
    """Whether it is going to be killed; otherwise it waits for such a worker."""
    about: Identity
    """The worker that is going to be killed."""
    reason: str
    node: str
    name: str
    """The name of the file of evidence."""


class Findings(NamedTuple):
    """What a look at a worker has brought to light."""

    spec: WorkerSpec
    evidence: Evidence
    name: str
    """The name of the file of it."""


def look_at(subject: Subject, clock: Callable[[], float] = time.monotonic) -> Evidence:
    """The evidence about a worker that was asked for its testimony. Takes `LOOK_S` at most.

    Args:
        clock: seconds of the clock of its flight record.
    """
    end_s, spec, notes = clock() + LOOK_S, subject.spec, list[str]()
    is_still = is_stopped(subject.pid)
    threads, memory, record = threads_of(subject.pid), memory_of(subject.pid), record_of(spec)
    now_s = clock()
    told = None if is_still else _testimony(spec, clock() + _ANSWER_S, clock)
    stacks = told.stacks if told is not None else ()
    if subject.is_hung and not stacks:
        stacks = _stacks_by_signal(subject, min(clock() + _SIGNAL_S, end_s), clock, is_still)
    if not stacks:
        notes.append("no Python stacks: it did not answer")
    native = ""
    if subject.is_hung and not is_still and end_s - clock() > _LEAST_S:
        native, note = native_stacks(subject.pid, end_s - clock())
        notes += [note] if note else []
    return Evidence(
        role="hung" if subject.is_hung else "waiting",
        rank=spec.rank,
        incarnation=spec.incarnation,
        node=subject.node,
        pid=subject.pid,
        reason=subject.reason,
        about=str(subject.about),
        generation=record.generation if record is not None else 0,
        step=record.step if record is not None else 0,
        busy=busy_text(record, now_s) if record is not None else "",
        operations=last_operations(record, now_s) if record is not None else (),
        stacks=stacks,
        threads=threads,
        memory=memory,
        native=native,
        device=told.device if told is not None else {},
        collectives=told.collectives if told is not None else None,
        notes=(*notes, *(told.notes if told is not None else ())),
    )


def _testimony(spec: WorkerSpec, end_s: float, clock: Callable[[], float]) -> Evidence | None:
    """What a worker tells of itself; None if it has not told anything by `end_s`."""
    found = None
    while True:
        with contextlib.suppress(OSError, ValueError):
            found = read_evidence(spec.testimony)
        if (found is not None and not found.notes) or clock() >= end_s:
            return found
        time.sleep(_POLL_S)


def _stacks_by_signal(
    subject: Subject, end_s: float, clock: Callable[[], float], is_stopped: bool
) -> tuple[ThreadStack, ...]:
    """The stacks that a worker writes on a signal; empty if it has not done so by `end_s`.

    Args:
        is_stopped: whether a signal has stopped it; it is stopped again then.
    """
    path = subject.spec.stacks
    before = _content(path)
    if not before:  # the signal would end it
        return ()
    header, stacks, size = before.partition(b"\n")[0] + b"\n", tuple[ThreadStack, ...](), -1
    with contextlib.suppress(ProcessLookupError):
        ask_for_stacks(subject.pid, subject.descriptor, is_stopped=is_stopped)
        while clock() < end_s:
            time.sleep(_POLL_S)
            content = _content(path)
            written = content[len(before) :]
            stacks = parsed_stacks((header + written).decode(errors="replace"))
            # The main thread is the last that is written.
            if stacks and stacks[0].frames and len(content) == size:
                break
            size = len(content)
        if is_stopped:
            signal.pidfd_send_signal(subject.descriptor, signal.SIGSTOP)
    return stacks


def _content(path: Path) -> bytes:
    try:
        return read_regular(path, _MOST_BYTES)
    except OSError:
        return b""


class Examiner:
    """Looks at workers, in threads, and keeps what is found. The agent's main thread uses it."""

    def __init__(self, folder: Path | None, node: str, report: Callable[[Findings], None]) -> None:
        """Nothing is looked at yet.

        Args:
            folder: the folder of the run's incidents, as this node sees it; None: there is none,
                and nothing is looked at.
            report: called in another thread with what was found, before it is written.
        """
        self._folder, self._node, self._report = folder, node, report
        self._threads: list[threading.Thread] = []

    @property
    def keeps(self) -> bool:
        """Whether there is a place for what is found."""
        return self._folder is not None

    def begin(
        self, spec: WorkerSpec, pid: int, descriptor: int, *, about: Identity, reason: str
    ) -> str:
        """Begin to look at a worker that has been asked for its testimony.

        Args:
            descriptor: its pidfd, which stays the caller's.
            about: the worker that is going to be killed: it, or one that it waits for.
        Returns:
            The name of the file of what is found, of which a report follows, unless the machine
            prevents that; empty if it is not looked at.
        """
        if self._folder is None:
            return ""
        try:
            own = os.dup(descriptor)
        except OSError:
            return ""
        is_hung = about == spec.identity
        name = evidence_name("hung" if is_hung else "waiting", str(spec.identity))
        subject = Subject(spec, pid, own, is_hung, about, reason, self._node, name)
        return name if self._start(lambda: self._look(subject)) else ""

    def keep(self, spec: WorkerSpec) -> Findings | None:
        """Keep the evidence that a worker left of its failure; None if it left none."""
        if self._folder is None:
            return None
        try:
            left = read_evidence(spec.failure)
        except (OSError, ValueError):
            return None
        told = msgspec.structs.replace(left, node=self._node, about=str(spec.identity))
        findings = Findings(spec, told, evidence_name("failed", str(spec.identity)))
        self._start(lambda: self._write(findings))
        return findings

    def close(self, patience_s: float = LOOK_S) -> None:
        """Wait for what is still written, for a time: the disk may be what hangs."""
        end_s = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _start(self, work: Callable[[], None]) -> bool:
        thread = threading.Thread(target=work, name="holdfast-examination", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no further thread may begin
            logger.warning("no evidence: %s", error)
            return False
        self._threads = [*(other for other in self._threads if other.is_alive()), thread]
        return True

    def _look(self, subject: Subject) -> None:
        try:
            with _closing(subject.descriptor):
                findings = Findings(subject.spec, look_at(subject), subject.name)
        except Exception:  # it is killed all the same
            logger.exception("no evidence about rank %s", subject.spec.identity)
            return
        self._report(findings)
        self._write(findings)

    def _write(self, findings: Findings) -> None:
        assert self._folder is not None
        try:
            write_evidence(self._folder / findings.name, findings.evidence)
        except OSError as error:
            logger.warning("evidence cannot be kept: %s", error)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)
