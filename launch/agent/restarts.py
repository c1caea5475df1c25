"""The rule for restarts: when a lost worker starts again, and when that has become pointless."""

from __future__ import annotations

from dataclasses import dataclass

NO_PROGRESS_EXIT = 30
"""The exit code of an agent whose workers keep ending with no step committed in between. It belongs
to the family of 3: the run's state is sound and can be resumed, but starting it again without a
change will not help."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The patience of an agent."""

    limit: int = 5
    """The most restarts of one rank in a row without a committed step between them."""
    first_s: float = 0.25
    """The delay of the second restart in a row; the first has none. It doubles with each further
    one."""
    longest_s: float = 30.0


class Restarts:
    """Counts restarts since the last progress. The clock is the caller's."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._in_a_row: dict[int, int] = {}
        self._reasons: dict[int, str] = {}
        self._step = -1

    def committed(self, step: int) -> None:
        """Note that the run has committed `step` steps; only an increase is progress."""
        if step > self._step:
            self._step = step
            self._in_a_row.clear()
            self._reasons.clear()

    def repeats(self, rank: int, reason: str) -> bool:
        """Whether a rank fails for the reason for which the worker before it failed.

        Progress in between makes it another failure. Without progress the next worker would fail
        in the same way.
        """
        before, self._reasons[rank] = self._reasons.get(rank), reason
        return before == reason

    def delay_s(self, rank: int) -> float | None:
        """Seconds to wait before restarting a rank that has just ended; None: do not restart."""
        policy, before = self._policy, self._in_a_row.get(rank, 0)
        if before >= policy.limit:
            return None
        self._in_a_row[rank] = before + 1
        return min(policy.longest_s, policy.first_s * 2 ** (before - 1)) if before else 0.0
