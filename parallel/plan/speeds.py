"""The speeds of stage replicas, by which micro-batches are divided between them. Pure.

A slow rank gets fewer micro-batches of its stage, and one that could not end a single one in the
time of the others gets none, and becomes a spare. The bits of a step do not depend on the division.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.parallel.layout import StageReplica
from holdfast.parallel.plan.plan import Plan, Slowness

USUAL = 100
_PER_RANK = 9600
"""The capacity of a rank that is not slow: a number with many divisors."""


def capacity(replica: StageReplica, slowness: Slowness) -> int:
    """How much a stage replica computes in a time: of its ranks, all wait for the slowest."""
    slow = dict(slowness)
    return len(replica) * _PER_RANK * USUAL // max(slow.get(rank, USUAL) for rank in replica)


def capacities(stage: Sequence[StageReplica], slowness: Slowness) -> tuple[int, ...]:
    """The capacity of each replica of a stage."""
    return tuple(capacity(replica, slowness) for replica in stage)


def widest_capacities(plan: Plan) -> tuple[int, ...]:
    """The capacities in the first stage that has the most replicas."""
    return capacities(max(plan.stage_replicas.stages, key=len), plan.slowness)


def usual_ranks(stage: Sequence[StageReplica], slowness: Slowness) -> tuple[float, ...]:
    """Of each replica of a stage, the ranks of usual speed that would be as fast."""
    return tuple(found / _PER_RANK for found in capacities(stage, slowness))


def makespan(plan: Plan, slowness: Slowness) -> float:
    """When the last stage replica has computed its micro-batches of a step.

    The unit is the time that a usual rank takes for a whole micro-batch of the model.

    Args:
        slowness: of ranks as they are, whatever the plan was made for.
    """
    flops = [float(layer.forward_flops) for layer in plan.layers]
    total, whole = max(1.0, sum(flops)), plan.configured_mesh.shards
    found = 0.0
    for stage, replicas in enumerate(plan.stage_replicas.stages):
        chunks = [c for c, at in enumerate(plan.placement) if at == stage]
        share = sum(flops[layer] for c in chunks for layer in plan.layers_of(c)) / total
        for number, held in enumerate(replicas):
            count = len(plan.micro_batches_of(stage, number))
            found = max(found, count * share * whole * _PER_RANK / capacity(held, slowness))
    return found
