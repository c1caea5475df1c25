"""A worker slot: a rank of this node, and the process that fills it now."""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import time
from collections.abc import Set
from dataclasses import dataclass

from holdfast.elastic import MembershipEvent, MembershipEventKind, WorkerSpec, liveness_age_s

logger = logging.getLogger("holdfast.agent")


@dataclass(slots=True)
class WorkerSlot:
    """A rank that this node starts again when it is lost.

    Only the agent's main thread changes it. It notes all that a worker has said, so that the end of
    its process can be judged: hence its many attributes.
    """

    spec: WorkerSpec
    channel: socket.socket | None = None
    descriptor: int = -1
    """The worker's pidfd; -1 if no process runs."""
    pid: int = 0
    """The process id; 0: no process; -1: one has been asked for."""
    start_at_s: float | None = None
    """The time at which its next worker starts."""
    is_member: bool = False
    """Whether its worker has reported a generation and is in the newest one."""
    is_inside: bool = False
    """Whether its worker is in a generation now, and not on the way to another."""
    waits_for: Set[int] = frozenset()
    """The ranks of other nodes that its worker has waited for too long, in its present step."""
    left_out_s: float | None = None
    """The time since which the newest generation lacks its worker, which was a member."""
    is_incurable: bool = False
    """Whether its worker has said that no replacement can cure the reason for its end."""
    is_sick: bool = False
    """Whether its worker has said that its machine computes wrongly; it stays so."""
    finished: bool = False
    """Whether its worker has said that the run's last step is done and saved."""
    has_left: bool = False
    """Whether its worker has said that others have its state, as it was told to leave."""
    killed_for: str = ""
    """The reason for which its worker was killed."""
    evidence: str = ""
    """The name of the file of evidence about its worker, as it hung or failed."""
    still_since_s: float | None = None
    """The time at which its worker last ran, if it was still as it was condemned: a look at it may
    have let it run since."""

    def begin(self) -> None:
        """Forget the last worker, as the next one has been asked for."""
        self.pid, self.killed_for, self.start_at_s = -1, "", None
        self.is_member, self.is_inside, self.left_out_s = False, False, None
        self.waits_for, self.is_incurable, self.still_since_s = frozenset(), False, None
        self.evidence = ""
        self.finished = self.has_left = False

    def event(self, kind: MembershipEventKind, cause: str, seconds: float) -> MembershipEvent:
        """An event of its worker; for `seconds` see `MembershipEvent.age_s`."""
        evidence = self.evidence if kind == "ended" else ""
        identity, node = self.spec.identity, self.spec.node
        return MembershipEvent(kind, identity, cause, seconds, node, evidence=evidence)

    @property
    def silent_s(self) -> float:
        """Seconds since its worker last ran; 0 if it never has."""
        if self.still_since_s is not None:
            return time.monotonic() - self.still_since_s
        return liveness_age_s(self.spec.liveness) or 0.0

    def hang_up(self, selector: selectors.BaseSelector) -> None:
        """Close the worker's channel, if it is open, and forget it in the agent's selector."""
        if self.channel is not None:
            selector.unregister(self.channel)
            self.channel.close()
            self.channel = None

    def signal(self, number: int) -> None:
        """Send a signal to exactly this worker, if it runs."""
        if self.descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.descriptor, number)

    def kill(self, why: str) -> None:
        """Kill the worker, whatever state it is in, so that it does nothing more."""
        if self.descriptor >= 0 and not self.killed_for:
            self.killed_for = why
            logger.warning("rank %s is killed: %s", self.spec.identity, why)
            self.signal(signal.SIGKILL)

    def cause_of_end(self, code: int) -> str:
        """The end of its worker in words.

        Args:
            code: its exit code, or the negative number of the signal that killed it.
        """
        if code == -signal.SIGKILL and self.killed_for:
            return self.killed_for
        if self.is_sick:
            return "computes wrongly, as an audit has found"
        if not code and self.has_left:
            return "has handed its state over"
        if not code:
            return "ended without a word that the run is done"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
