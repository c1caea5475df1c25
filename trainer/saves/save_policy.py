"""The save policy: when a run saves, as a value from its configuration. Pure.

Beside it, the progress of a rank's saves, on which the policy decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from holdfast.trainer.config import RunConfig

RETRY_S = 60.0
"""The time after which a save that failed is tried again, with the state of that time."""


class SaveDecision(Enum):
    """The kind of save after a step."""

    NOTHING = auto()
    DISK = auto()
    MEMORY = auto()
    SKIPPED = auto()
    """A save was due, and is skipped because the last one is still under way."""


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """When a run saves."""

    last_step: int
    """The run's last step, which is always saved."""
    every: int = 0
    """Steps between checkpoints on the disk; 0: none by steps."""
    every_seconds: float = 0.0
    """Seconds between checkpoints on the disk; 0: none by time."""
    memory_every: int = 0
    """Steps between copies in memory; 0: none."""
    skips_when_busy: bool = False
    """Whether a save that is due too soon is skipped instead of waiting for the last one."""

    @staticmethod
    def of(config: RunConfig) -> SavePolicy:
        """The policy of a run's configuration."""
        section = config.checkpoint
        return SavePolicy(
            last_step=config.train.steps,
            every=section.every,
            every_seconds=section.every_seconds,
            memory_every=section.memory_every,
            skips_when_busy=section.policy == "skip",
        )

    def is_overdue(self, now_s: float, saved_s: float, failed_s: float | None = None) -> bool:
        """Whether a save is due by time at `now_s`; the last one began at `saved_s`.

        Args:
            failed_s: the time at which the last one was known to have failed; None: it has not.
        """
        if failed_s is not None and now_s - failed_s >= RETRY_S:
            return True
        return self.every_seconds > 0 and now_s - saved_s >= self.every_seconds

    def decide(self, step: int, *, asked: bool, stopping: bool, busy: bool) -> SaveDecision:
        """The kind of save after `step` steps.

        Args:
            asked: whether a rank asked for a save: by a signal, or because one is overdue.
            stopping: whether the run ends after this step.
            busy: whether the last save is still under way on some rank.
        """
        wanted = asked or stopping
        due = wanted or (self.every > 0 and step % self.every == 0)
        in_memory = self.memory_every > 0 and step % self.memory_every == 0
        if not due and not in_memory:
            return SaveDecision.NOTHING
        if busy and self.skips_when_busy and not wanted:
            # The last step is saved when the run finishes.
            return SaveDecision.SKIPPED if step < self.last_step else SaveDecision.NOTHING
        return SaveDecision.DISK if due else SaveDecision.MEMORY


@dataclass(slots=True)
class SaveProgress:
    """The progress of a rank's saves."""

    saved_s: float
    """The time at which the last save to the disk began."""
    saved_step: int = -1
    """The step of that save; -1: none."""
    committed_step: int = -1
    """The newest step known to be on the disk; -1: none."""
    is_owed: bool = False
    """Whether a save that was due was given up, and none has begun since."""
    failed_s: float | None = None
    """The time at which that save was known to have failed; None: it has not."""
