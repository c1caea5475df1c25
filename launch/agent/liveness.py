"""How an agent decides, from outside a worker, that the worker hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from holdfast.elastic import WorkerSpec, liveness_age_s

LivenessCheck = Callable[[WorkerSpec, int], str | None]
"""Why the worker of this specification and process id counts as hung; None if it does not."""


def timestamp_check(stopped_s: float, hang_timeout_s: float) -> LivenessCheck:
    """A check of the liveness timestamp, which the worker's Python writes ten times a second.

    Args:
        stopped_s: how long a signal may stop a process.
        hang_timeout_s: how long something, such as a held lock, may keep an interpreter from
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

    What follows the last `)` of its line begins with the state.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return line.rpartition(")")[2].split()[0] == "T"
