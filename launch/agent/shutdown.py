"""The end of an agent, and its exit code. Pure: the time is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.parallel.errors import ConfigError, Diverged, Interrupted, Stopped
from holdfast.parallel.output import Interrupts

INTERRUPTED = Interrupted.exit_code
"""The exit code after SIGINT."""


@dataclass(slots=True)
class Shutdown:
    """Whether, why and by when the workers of a node end."""

    finished: bool = False
    """Whether the run has reached its end."""
    draining: bool = False
    """Whether the node leaves the run."""
    interrupts: Interrupts = field(default_factory=Interrupts)
    """Whether a person has interrupted it."""
    has_left: bool = False
    """Whether it has left: others have the state of all its workers, and train on."""
    code: int | None = None
    """The exit code, once it is decided."""
    reason: str = ""
    """Why the node has ended before the run did, for a person; empty where workers have said it."""
    failed_with: int = Stopped.exit_code
    """The exit code of the last worker that failed."""
    kill_at_s: float | None = None
    """The time at which living workers are killed; None: the node goes on."""
    cause: str = ""
    """Why they are killed then."""

    def within(self, seconds: float, now_s: float, why: str) -> None:
        """Give the workers this many seconds; the earliest deadline counts.

        Args:
            why: why they have to end, as the rest of a sentence that begins with "its node ends:".
        """
        deadline_s = now_s + seconds
        if self.kill_at_s is None or deadline_s < self.kill_at_s:
            late = f", and it has not ended within {seconds:g} s" if seconds else ""
            self.kill_at_s, self.cause = deadline_s, f"its node ends: {why}{late}"

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to kill the living workers."""
        return self.kill_at_s is not None and now_s > self.kill_at_s

    @property
    def needs_no_report(self) -> bool:
        """Whether no other node waits for reports about this node's workers."""
        final = (ConfigError.exit_code, Diverged.exit_code, INTERRUPTED)
        return self.finished or self.code in final

    @property
    def exit_code(self) -> int:
        """The agent's exit code; see `Agent.run`."""
        if self.code is not None:
            return self.code
        if self.finished:
            return 0
        if self.draining:
            if self.interrupts.came:
                return INTERRUPTED
            return 0 if self.has_left else Stopped.exit_code
        return self.failed_with
