"""Values: what the vote of a step has decided, and how far a rank has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of one rank to all for the end of a step; the vote tells every rank of them.

    Field names are marks of the vote; see ballot.py.
    """

    save: bool = False
    """A checkpoint."""
    stop: bool = False
    """A checkpoint, and the end of the run."""
    busy: bool = False
    """Whether this rank's last save is still under way."""
    change: bool = False
    """Whether ranks wait to be taken in or let go."""
    filling: bool = False
    """Whether state of the next plan still goes to or from this rank; see BackgroundTransfer."""
    leave: bool = False
    """Whether this rank leaves at the next change."""


NO_REQUESTS = Requests()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Decision of the vote of a step: equal on all ranks, bit for bit."""

    loss: float
    """Mean over the step's tokens, before the update."""
    grad_norm: float
    """Before clipping; NaN when a gradient is not finite."""
    nonfinite_ranks: int
    """Ranks that saw a gradient that is not finite."""
    out_of_range_ranks: int
    """Ranks where a fixed-point sum overflowed."""
    requests: Requests = NO_REQUESTS
    leaving_ranks: int = 0
    """How many ranks leave at the next change."""

    @property
    def usable(self) -> bool:
        """Whether the step may be applied."""
        return not (self.nonfinite_ranks or self.out_of_range_ranks) and self.grad_norm > 0


@dataclass(slots=True)
class StepProgress:
    """How far one rank is; ranks exchange it when a step was interrupted."""

    decided: int = 0
    """Steps whose vote is over on this rank."""
    outcome: Outcome | None = None
    """Of the last of these votes."""
    updated: int = 0
    """Steps whose update its own blocks have."""
    complete: bool = True
    """Whether its parameters are those after `updated` steps: all blocks have been gathered."""
    filled: bool = True
    """Whether the last vote said that all state incoming under the active plan has arrived."""
