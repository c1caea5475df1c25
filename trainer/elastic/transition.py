"""The transition: the plan after a membership change. Pure; equal on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from holdfast.elastic import Generation
from holdfast.parallel.plan import (
    Plan,
    Roster,
    missing_blocks,
    next_plan,
    replan,
    state_of,
    with_shadows,
)
from holdfast.trainer.elastic.worker_status import RecoveryPlan
from holdfast.trainer.step import RecentSteps, lasting

WITHIN_STEP = "within a step"
BETWEEN_STEPS = "between steps"
_NONE_RECENT = RecentSteps()


@dataclass(frozen=True, slots=True)
class Transition:
    """A membership change as it is planned."""

    generation: Generation
    """The new generation."""
    recovery: RecoveryPlan
    before: Plan
    """The plan by which the holders' state is laid out; the configured plan if no rank holds
    state."""
    after: Plan
    recent: RecentSteps = _NONE_RECENT
    """What the holders remember of the last steps."""

    @property
    def failure_domains(self) -> Mapping[int, str]:
        """The failure domain of each rank of the new generation."""
        return self.generation.failure_domains

    @property
    def keeps_state(self) -> bool:
        """Whether live ranks have the state of every block, so that no checkpoint is needed."""
        return has_all_blocks(self.before, self.recovery)


def has_all_blocks(plan: Plan, recovery: RecoveryPlan) -> bool:
    """Whether the holders together have the state of every block of a plan."""
    held = state_of(plan, recovery.holders, filled=recovery.filled)
    return bool(recovery.holders) and not missing_blocks(plan, held)


def plan_transition(
    generation: Generation,
    recovery: RecoveryPlan,
    before: Plan,
    *,
    redundancy: int,
    recent: RecentSteps = _NONE_RECENT,
    has_room: Callable[[Plan, int], bool] | None = None,
    relieves: bool = False,
) -> Transition:
    """Plan for the ranks of a new generation.

    Args:
        redundancy: the number of shadows of each block.
        recent: what the holders remember of the last steps.
        has_room: whether a rank's memory suffices for a plan; see `Roster.has_room`.
        relieves: whether slow ranks get less to compute.
    """
    staying = frozenset(recovery.staying) - recovery.fresh
    slow = lasting(recent.slowness) if relieves else ()
    roster = Roster(
        recovery.staying,
        generation.failure_domains,
        recovery.fresh,
        recent.loads,
        tuple((rank, times) for rank, times in slow if rank in staying),
        has_room,
    )
    number = generation.number
    # Within a step, layers stay: the sums of moved layers would have to be recomputed.
    move_layers = all(member.phase != WITHIN_STEP for member in generation.members)
    if not recovery.holders and recovery.staying == before.stage_replicas.ranks:
        numbered = before.evolved(generation=number)
        after = with_shadows(numbered, roster, redundancy)
    elif not has_all_blocks(before, recovery):
        after = replan(
            before, roster, generation=number, redundancy=redundancy, move_layers=move_layers
        )
    else:
        after = next_plan(
            before,
            roster,
            filled=recovery.filled,
            generation=number,
            redundancy=redundancy,
            move_layers=move_layers,
        )
    kept = tuple(tuple(pair for pair in w if pair[0] in staying) for w in recent.slowness)
    return Transition(generation, recovery, before, after, replace(recent, slowness=kept))
