"""The liveness check: how an agent decides, from outside a worker, that the worker hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from holdfast.elastic import (
    HangJudge,
    Identity,
    MembershipEvent,
    Wait,
    WorkerSpec,
    format_identities,
    liveness_age_s,
)
from holdfast.launch.agent.worker_slot import WorkerSlot

LEFT_OUT_S = 10.0
"""Seconds that a worker may live after the others went on without it; it ends by itself."""

LivenessCheck = Callable[[WorkerSpec, int], str | None]
"""The reason why the worker with a specification and process id counts as hung; None if it does
not."""


def timestamp_check(stopped_s: float, hang_timeout_s: float) -> LivenessCheck:
    """A check of the liveness timestamp, which the worker's Python writes ten times a second.

    Args:
        stopped_s: seconds that a signal may stop a process.
        hang_timeout_s: seconds that something, such as a held lock, may keep an interpreter from
            running.
    """

    def judge(spec: WorkerSpec, pid: int) -> str | None:
        age_s = liveness_age_s(spec.liveness)
        if age_s is None:
            return None
        if age_s > stopped_s and _is_stopped(pid):
            return f"stopped by a signal for {age_s:.1f} s"
        if age_s > hang_timeout_s:
            return f"hung: its interpreter has not run for {age_s:.1f} s"
        return None

    return judge


def _is_stopped(pid: int) -> bool:
    """Whether a process is in state T.

    The state follows the last `)` of the line in its stat file.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return line.rpartition(")")[2].split()[0] == "T"


class HangWatch:
    """Finds the workers of a node that hang, and those that wait for others too long."""

    def __init__(
        self,
        node: str,
        checks: Sequence[LivenessCheck],
        waits: Callable[[WorkerSpec], Wait | None] | None,
    ) -> None:
        """Watch the workers of a node.

        Args:
            waits: returns the wait of a worker that has lasted too long, if any; None: no check.
        """
        self._node, self._checks, self._waits = node, checks, waits
        self._judge = HangJudge()

    def enter(self, generation: int) -> None:
        """Enter a generation; waits of earlier ones no longer count."""
        self._judge.enter(generation)

    def hear(self, event: MembershipEvent, now_s: float) -> None:
        """Note the event of a worker that waits for others too long."""
        self._judge.hear(event, now_s)

    def causes(
        self, slots: Iterable[WorkerSlot], now_s: float, *, draining: bool
    ) -> dict[int, str]:
        """The running workers to kill: rank -> reason.

        Args:
            draining: whether the node leaves the run, and the others will go on without it.
        """
        culprits = self._judge.culprits(now_s)
        found: dict[int, str] = {}
        for slot in slots:
            if slot.descriptor < 0:
                continue
            causes = (check(slot.spec, slot.pid) for check in self._checks)
            cause = next((cause for cause in causes if cause), None)
            if cause is None and slot.is_member:
                cause = culprits.get(slot.spec.rank)
            left_out = slot.left_out_s is not None and now_s - slot.left_out_s > LEFT_OUT_S
            if cause is None and left_out and not draining:
                cause = "the others went on without it, and it has not ended"
            if cause is not None:
                found[slot.spec.rank] = cause
        return found

    def new_waits(self, slots: Iterable[WorkerSlot], generation: int) -> list[MembershipEvent]:
        """The new events of members that have waited too long."""
        if self._waits is None:
            return []
        return [
            MembershipEvent(
                "waiting",
                slot.spec.identity,
                f"has waited {wait.seconds:.1f} s for rank "
                f"{', '.join(map(str, sorted(wait.peers)))} ({wait.operation})",
                wait.seconds,
                self._node,
                generation,
                format_identities(Identity(rank) for rank in wait.peers),
            )
            for slot in slots
            if slot.descriptor >= 0
            and slot.is_member
            and not self._judge.has(slot.spec.identity)
            and (wait := self._waits(slot.spec)) is not None
        ]
