"""The values of a vote's outcome and of a rank's progress."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests of one rank for the end of a step; the vote tells all ranks.

    Field names are marks of the vote; see ballot.py.
    """

    save: bool = False
    """Asks for a checkpoint."""
    stop: bool = False
    """Asks for a checkpoint, and the end of the run."""
    interrupt: bool = False
    """Whether a person asks for that (SIGINT)."""
    busy: bool = False
    """Whether this rank's last save is still under way."""
    change: bool = False
    """Whether ranks wait to join or leave."""
    filling: bool = False
    """Whether state of the next plan is still on its way to or from this rank; see
    BackgroundTransfer."""
    leave: bool = False
    """Whether this rank leaves at the next change."""


NO_REQUESTS = Requests()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a step's vote: equal on all ranks, bit for bit."""

    loss: float
    """The mean over the step's tokens, before the update."""
    grad_norm: float
    """The norm before clipping; NaN if a gradient is not finite."""
    nonfinite_ranks: int
    """The number of ranks with a gradient that is not finite."""
    out_of_range_ranks: int
    """The number of ranks with an overflow of a fixed-point sum."""
    requests: Requests = NO_REQUESTS
    leaving_ranks: int = 0
    """The number of ranks that leave at the next change."""
    skipped: int = 0
    """The steps up to this one that were not usable, in a row."""

    @property
    def usable(self) -> bool:
        """Whether the step may be applied."""
        return not (self.nonfinite_ranks or self.out_of_range_ranks) and self.grad_norm > 0


@dataclass(slots=True)
class StepProgress:
    """The progress of one rank, shared between ranks after an interrupted step."""

    decided: int = 0
    """The number of steps whose vote is over on this rank."""
    outcome: Outcome | None = None
    """The outcome of the last of these votes."""
    updated: int = 0
    """The number of steps whose update its own blocks have."""
    complete: bool = True
    """Whether its parameters are those after `updated` steps: all blocks have been gathered."""
    filled: bool = True
    """Whether the last vote said that all state incoming under the active plan has arrived."""
