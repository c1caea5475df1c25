"""The values of a vote's outcome and of a rank's progress, and the hook by which it is followed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Protocol

from msgspec import Meta

from holdfast.parallel.plan import Slowness
from holdfast.parallel.schedules import StepPhase

_Numbers = Annotated[tuple[float, ...], Meta(max_length=4096)]
_Loads = tuple[tuple[int, ...], ...]
_FORGOTTEN = 8
"""A step forgets the eighth part of the loads before."""


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
    rewind: bool = False
    """Whether a person asks for steps to be taken back."""


NO_REQUESTS = Requests()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a step's vote: equal on all ranks, bit for bit.

    It has a field for each thing that the vote tells.
    """

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
    spike: str = ""
    """What makes the step a spike, which is not applied; empty: it is none."""
    layer_norms: tuple[tuple[float, float], ...] = ()
    """Of each layer, the norms of its gradients before clipping and of its parameters before the
    update; empty: they were not asked for."""
    layer_outputs: tuple[tuple[float, float] | None, ...] = ()
    """Of each layer but the last, the root mean square of its output and the largest absolute
    value, None if one is not finite; empty: they were not asked for."""
    loads: tuple[tuple[int, ...], ...] = ()
    """Of each layer, the choices of each of its experts in the step; empty: there are none."""
    further_losses: tuple[float, ...] = ()
    """The means of the losses of further tokens, over all of the step's tokens; empty: there are
    none, or the step is not sound."""
    logits: tuple[tuple[float, ...], ...] = ()
    """Of each layer, the largest logit of each head in the step, empty where it has no attention;
    empty: they were not asked for, or are not finite."""

    bit_sums: tuple[tuple[int, int], ...] = ()
    """Of each layer, the weighted sums modulo 2**64 of the bits of its gradients before clipping
    and of its parameters before the update; empty: they were not asked for."""

    slowness: Slowness | None = None
    """The ranks that compute slowly; None: the step does not compare them."""

    @property
    def has_numbers(self) -> bool:
        """Whether the loss and norm are those of a sound step, which is applied or is a spike."""
        return not (self.nonfinite_ranks or self.out_of_range_ranks) and self.grad_norm > 0

    @property
    def usable(self) -> bool:
        """Whether the step may be applied."""
        return self.has_numbers and not self.spike


@dataclass(frozen=True, slots=True)
class RecentSteps:
    """The losses and gradient norms of the last steps, oldest first, and the loads of experts.

    Steps with numbers that are not finite are not among them.
    """

    losses: _Numbers = ()
    grad_norms: _Numbers = ()
    loads: _Loads = ()
    """Of each layer, the choices of each of its experts, of which each further step forgets an
    eighth; not part of checkpoints."""
    slowness: tuple[Slowness, ...] = ()
    """The slow ranks at each of the last two comparisons; not part of checkpoints."""

    def after(self, outcome: Outcome, window: int) -> RecentSteps:
        """These after one more step.

        Args:
            window: the number of steps that are remembered; 0: none.
        """
        recent = replace(self, loads=_added(self.loads, outcome.loads))
        if outcome.slowness is not None:
            recent = replace(recent, slowness=(*self.slowness, outcome.slowness)[-2:])
        if not window or not outcome.has_numbers:
            return recent
        return replace(
            recent,
            losses=(*self.losses, outcome.loss)[-window:],
            grad_norms=(*self.grad_norms, outcome.grad_norm)[-window:],
        )


def _added(before: _Loads, loads: _Loads) -> _Loads:
    if not before:
        return loads
    return tuple(
        tuple(old - old // _FORGOTTEN + new for old, new in zip(*rows, strict=True))
        for rows in zip(before, loads, strict=True)
    )


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
    recent: RecentSteps = RecentSteps()
    """The last of the decided steps, as far as a guard of spikes remembers them."""
    rewinds: int = 0
    """How often this run has gone back to an earlier step, since its ranks began."""

    def decide(self, steps: int, outcome: Outcome, window: int) -> None:
        """Take the outcome of the last of `steps` steps, from a vote or from other ranks.

        Args:
            window: the steps that a guard of spikes remembers.
        """
        self.decided, self.outcome = steps, outcome
        self.recent = self.recent.after(outcome, window)


class AtPhase(Protocol):
    """A function that is called when a rank reaches a phase of a step; faults are injected here."""

    def __call__(self, step: int, phase: StepPhase, /) -> None:
        """Handle a phase; may be called in any thread.

        Args:
            step: counted from 1.
            phase: "fill" when state begins to be copied beside the step, "backward" when half of
                the backward passes have begun, "exchange" and "gather" when the first gradient sums
                and parameters of this rank are on their way, "prefetch" when parameters of later
                layers are, otherwise the phase that begins.
        """
        ...


def no_hook(step: int, phase: StepPhase, /) -> None:
    """Does nothing."""
