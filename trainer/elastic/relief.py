"""When a plan is changed for slow ranks: once they have cost more than the change does.

An action is taken when what was lost without it reaches its cost, so all in all at most twice as
much is lost as with knowledge of the future (the ski rental problem, Karlin et al. 1988).
"""

from __future__ import annotations

from holdfast.parallel.plan import makespan, relieved, would_move_experts
from holdfast.trainer.config import ElasticConfig
from holdfast.trainer.step import Training, lasting, usual_s

_COST_S = 0.5
"""What a change is taken to cost until one has been measured, in seconds."""
_WORTH = 0.05
"""The least share of a step's computation that a change must save."""


class Balance:
    """Weighs what an uneven plan costs: slow ranks, and loads of experts. Local.

    Ranks may differ in when they wish for a change: one that does suffices.
    """

    def __init__(self, elastic: ElasticConfig) -> None:
        """Nothing is lost yet."""
        self._elastic = elastic
        self._lost_s = 0.0
        """What other shares of the work would have saved since the last change, in seconds."""
        self._cost_s = _COST_S
        self._uneven_steps = 0
        """The last steps in a row after which other copies of experts were worth it."""

    def after_change(self, seconds: float | None) -> None:
        """Begin anew after a change of plan.

        Args:
            seconds: how long it took, if it was one between steps.
        """
        self._lost_s, self._uneven_steps = 0.0, 0
        if seconds is not None:
            self._cost_s = seconds

    def after_step(self, training: Training) -> None:
        """Count a step after which the plan is uneven, and what slow ranks have lost."""
        moves = would_move_experts(training.plan, training.progress.recent.loads)
        self._uneven_steps = self._uneven_steps + 1 if moves else 0
        outcome = training.progress.outcome
        if self._elastic.slow_ranks == "relieve" and outcome and outcome.slowness is not None:
            saved_s = savings_s(training)
            every = self._elastic.straggler_every
            self._lost_s = self._lost_s + every * saved_s if saved_s else 0.0

    @property
    def wants_change(self) -> bool:
        """Whether it was uneven for long enough, or as much was lost as a change costs."""
        uneven = self._uneven_steps >= self._elastic.expert_steps
        return uneven or (self._lost_s > 0 and self._lost_s >= self._cost_s)


def savings_s(training: Training) -> float:
    """The seconds of a step that other shares would save; 0: too little. Local; pure."""
    plan = training.plan
    slowness = lasting(training.progress.recent.slowness)
    if slowness == plan.slowness or plan.incoming or plan.spreads_experts:
        return 0.0
    now, then = makespan(plan, slowness), makespan(relieved(plan, slowness), slowness)
    if then > (1 - _WORTH) * now:
        return 0.0
    whole = sum(layer.forward_flops for layer in plan.layers)
    return (now - then) * usual_s(training.rank_times) * whole / plan.configured_mesh.shards
