"""Grounds on which an agent holds one of its own workers to be hung, found without the worker's help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from holdfast.elastic.channel import pulse_age_s
from holdfast.elastic.worker_spec import Seat

Evidence = Callable[[Seat, int], str | None]
"""Why the worker in a seat, with this process id, is held to be hung; None if it is not."""


def pulse_evidence(stopped_s: float, hang_timeout_s: float) -> Evidence:
    """Judges by the pulse, which the worker's Python writes ten times a second.

    Args:
        stopped_s: how long a process may be stopped by a signal.
        hang_timeout_s: how long an interpreter may be kept from running, as by a held lock.
    """

    def judge(seat: Seat, pid: int) -> str | None:
        age_s = pulse_age_s(seat.pulse)
        if age_s is None:
            return None
        if age_s > stopped_s and _is_stopped(pid):
            return f"stopped by a signal for {age_s:.1f} s"
        if age_s > hang_timeout_s:
            return f"hung: its interpreter has not run for {age_s:.1f} s"
        return None

    return judge


def _is_stopped(pid: int) -> bool:
    """Whether a process is in state T. What follows the last `)` of its line begins with the state."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return line.rpartition(")")[2].split()[0] == "T"
