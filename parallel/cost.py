"""What a plan costs: memory by rank, bubble, and step time. Estimates, stated before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.parallel.parameters import LayerSpec
from holdfast.parallel.plan import Plan
from holdfast.parallel.schedule import Action, Op, Timeline, peak_in_flight, simulate

PARAMETER_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_BACKWARD_SHARE = {
    Op.FORWARD: 1.0,
    Op.BACKWARD: 2.0,
    Op.BACKWARD_INPUT: 1.0,
    Op.BACKWARD_WEIGHT: 1.0,
}


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that one rank keeps."""

    parameters: int
    gradients: int
    """The accumulator: int64 in exact mode."""
    optimizer: int
    """Moments, reduced gradients and, in bf16, master weights of the blocks this rank owns."""
    activations: int
    """At the fullest moment of a step."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def action_cost(plan: Plan, flops_per_s: float = 1.0) -> Callable[[Action], float]:
    """The time of a compute action: its chunk's operations; a backward takes twice a forward."""
    chunk_flops = [
        sum(plan.layers[layer].forward_flops for layer in plan.layers_of(chunk)) / plan.mesh.tensor
        for chunk in range(len(plan.placement))
    ]
    return lambda action: (
        chunk_flops[action.chunk] * _BACKWARD_SHARE.get(action.op, 0.0) / flops_per_s
    )


def replica_timeline(plan: Plan, replica: int = 0, flops_per_s: float = 1.0) -> Timeline:
    """The simulated step of one replica's pipeline, by rank, messages free."""
    ranks = [plan.mesh.rank(0, replica, stage) for stage in range(plan.mesh.pipeline)]
    programs = {rank: plan.program(rank) for rank in ranks}
    return simulate(programs, action_cost(plan, flops_per_s))


def peak_activation_bytes(plan: Plan, rank: int) -> int:
    """The most bytes of activations that a rank's program keeps at once.

    A chunk's activations of a micro-batch are kept from its forward to its backward, or to its weight
    part where the backward is split.
    """
    chunk_bytes = {
        chunk: sum(plan.layers[layer].activation_bytes for layer in plan.layers_of(chunk))
        for chunk in plan.chunks_of(rank)
    }
    return int(peak_in_flight(plan.program(rank), size=chunk_bytes.__getitem__))


def rank_memory(plan: Plan, rank: int, *, precision: str, exact: bool) -> RankMemory:
    """The memory of one rank. Pure.

    Args:
        precision: "fp32", "bf16" or "fp64".
        exact: whether gradients are summed as int64.
    """
    index = plan.mesh.coordinates(rank).tensor
    held = sum(
        layer_elements(plan.layers[layer], index)
        for chunk in plan.chunks_of(rank)
        for layer in plan.layers_of(chunk)
    )
    owned = sum(
        block.elements
        for block, owner in zip(plan.blocks[index], plan.owners[index], strict=True)
        if owner == rank
    )
    state = 8 if precision == "fp64" else 4
    copies = 3 + (precision == "bf16")
    return RankMemory(
        parameters=held * PARAMETER_BYTES[precision],
        gradients=held * (8 if exact else state),
        optimizer=owned * state * copies,
        activations=peak_activation_bytes(plan, rank),
    )


def layer_elements(layer: LayerSpec, tensor_index: int) -> int:
    """Parameters of a layer on one tensor-parallel rank."""
    return sum(spec.elements for spec in layer.parameters[tensor_index])
