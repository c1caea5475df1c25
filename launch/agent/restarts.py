"""When a lost worker is started again, and when that has become pointless."""

from __future__ import annotations

from dataclasses import dataclass

NO_PROGRESS_EXIT = 30
"""Exit code of an agent whose workers keep ending with no step committed in between. Of the family
of 3: the run's state is sound and can be resumed, but starting it again without a change will not
help."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How patient an agent is."""

    limit: int = 5
    """Restarts of one rank in a row without a step committed between them."""
    first_s: float = 0.25
    """Delay of the second restart in a row; the first has none. Doubles with each after that."""
    longest_s: float = 30.0


class Restarts:
    """Counts restarts since the last progress. Not tied to a clock."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._in_a_row: dict[int, int] = {}
        self._step = -1

    def committed(self, step: int) -> None:
        """The run has committed `step` steps; one that it had committed before is no progress."""
        if step > self._step:
            self._step = step
            self._in_a_row.clear()

    def delay_s(self, rank: int) -> float | None:
        """How long to wait before starting a rank that has just ended; None: do not any more."""
        policy, before = self._policy, self._in_a_row.get(rank, 0)
        if before >= policy.limit:
            return None
        self._in_a_row[rank] = before + 1
        return min(policy.longest_s, policy.first_s * 2 ** (before - 1)) if before else 0.0
