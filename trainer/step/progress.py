"""Values: what the vote of a step has decided, and how far a rank has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Requests:
    """What some rank asks of all for the end of a step; every rank learns of it by the vote."""

    save: bool = False
    stop: bool = False
    busy: bool = False
    """Whether the save before is still under way."""
    change: bool = False
    """Whether ranks wait to be taken in or let go."""
    filling: bool = False
    """Whether state of the next plan still goes to or from this rank; see BackgroundTransfer."""
    leave: bool = False
    """Whether this rank is to be let go."""


NO_REQUESTS = Requests()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What every rank knows after the vote of a step; equal on all ranks, bit for bit."""

    loss: float
    """Mean over the step's tokens, before the update."""
    grad_norm: float
    """Before clipping; NaN when a gradient is not finite."""
    nonfinite_ranks: int
    out_of_range_ranks: int
    requests: Requests = NO_REQUESTS
    leaving_ranks: int = 0
    """How many ranks are to be let go."""

    @property
    def usable(self) -> bool:
        """Whether the step may be applied."""
        return not (self.nonfinite_ranks or self.out_of_range_ranks) and self.grad_norm > 0


@dataclass(slots=True)
class StepProgress:
    """How far a rank is: what survivors tell each other when a step was interrupted."""

    decided: int = 0
    """Steps whose vote this rank has come out of."""
    outcome: Outcome | None = None
    """Of the last of them."""
    updated: int = 0
    """Steps whose update its own blocks have had."""
    complete: bool = True
    """Whether its parameters are those after `updated` steps: all blocks have been gathered."""
    filled: bool = True
    """Whether the last vote said that all state incoming under the active plan has arrived."""
