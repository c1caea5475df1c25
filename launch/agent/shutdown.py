"""How an agent comes to its end, and with which exit code. Pure: time is given."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.parallel.errors import ConfigError, Stopped

INTERRUPTED = 130
"""Exit code after SIGINT."""


@dataclass(slots=True)
class Shutdown:
    """Whether, why and until when the workers of a node are to end."""

    finished: bool = False
    """The run has reached its end."""
    draining: bool = False
    """The node leaves the run."""
    code: int | None = None
    """The exit code, where it is decided."""
    failed_with: int = Stopped.exit_code
    """The exit code of the last worker that failed."""
    kill_at_s: float | None = None
    """When workers that still live are killed; None: the node goes on."""

    def within(self, seconds: float, now_s: float) -> None:
        """Give the workers this long; the earliest deadline counts."""
        deadline_s = now_s + seconds
        self.kill_at_s = deadline_s if self.kill_at_s is None else min(deadline_s, self.kill_at_s)

    def is_due(self, now_s: float) -> bool:
        """Whether workers that still live are to be killed."""
        return self.kill_at_s is not None and now_s > self.kill_at_s

    @property
    def needs_no_report(self) -> bool:
        """Whether no other node waits for reports about this node's workers."""
        return self.finished or self.code in (ConfigError.exit_code, INTERRUPTED)

    @property
    def exit_code(self) -> int:
        """The agent's; see `Agent.run`."""
        if self.code is not None:
            return self.code
        if self.finished:
            return 0
        return Stopped.exit_code if self.draining else self.failed_with
