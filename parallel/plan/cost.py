"""The costs of a plan, estimated before it runs: memory by rank, bubble and step time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.parallel.layout import LayerSpec
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.precision import Precision
from holdfast.parallel.schedules import Action, Op, Timeline, peak_in_flight, simulate

_BACKWARD_SHARE = {
    Op.FORWARD: 1.0,
    Op.BACKWARD: 2.0,
    Op.BACKWARD_INPUT: 1.0,
    Op.BACKWARD_WEIGHT: 1.0,
}


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The bytes that one rank keeps."""

    parameters: int
    gradients: int
    """The accumulator: int64 in exact mode."""
    optimizer: int
    """Reduced gradients, and the optimizer's kinds of state, of the blocks that this rank owns."""
    activations: int
    """Activations at the fullest moment of a step."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def action_cost(plan: Plan, flops_per_s: float = 1.0) -> Callable[[Action], float]:
    """The time of a compute action, by its chunk's operations; a backward takes two forwards."""
    chunk_flops = [
        sum(plan.layers[layer].forward_flops for layer in plan.layers_of(chunk))
        / plan.configured_mesh.shares
        for chunk in range(len(plan.placement))
    ]
    return lambda action: (
        chunk_flops[action.chunk] * _BACKWARD_SHARE.get(action.op, 0.0) / flops_per_s
    )


def replica_timeline(
    plan: Plan,
    replica: int = 0,
    flops_per_s: float = 1.0,
    link_bytes_per_s: float | None = None,
) -> Timeline:
    """The simulated step of one replica's pipeline, by rank.

    Without `link_bytes_per_s`, messages take no time.
    """
    ranks = [
        plan.stage_replicas.rank(0, replica, stage) for stage in range(plan.stage_replicas.pipeline)
    ]
    programs = {rank: training_program(plan, rank) for rank in ranks}
    if link_bytes_per_s is None:
        return simulate(programs, action_cost(plan, flops_per_s))
    rate = link_bytes_per_s
    return simulate(
        programs,
        action_cost(plan, flops_per_s),
        lambda send: _message_bytes(plan, send) / rate,
    )


def _message_bytes(plan: Plan, send: Action) -> int:
    """The bytes of a send: its chunk's output, or the gradient of its input."""
    producer = send.chunk if send.op is Op.SEND_FORWARD else send.chunk - 1
    return plan.layers[plan.layers_of(producer)[-1]].output_bytes


def reduction_bytes(plan: Plan, rank: int, *, precision: Precision, exact: bool) -> float:
    """The bytes a rank sends to its replicas in a step: gradient sums out, parameters back.

    With balanced owners each direction is (D - 1) / D of the rank's parameters, for D replicas.
    """
    place = plan.stage_replicas.find(rank)
    if place is None:
        return 0.0
    replicas = plan.stage_replicas.replicas(place.pipeline)
    element_bytes = precision.bytes + _gradient_bytes(precision, exact)
    return held_elements(plan, rank) * element_bytes * (replicas - 1) / replicas


def step_time_s(
    plan: Plan,
    *,
    precision: Precision,
    exact: bool,
    flops_per_s: float,
    link_bytes_per_s: float,
) -> float:
    """An estimate of a step's seconds: the slowest replica's pipeline, then the widest reduction.

    Computation and reduction are assumed not to overlap. The collectives inside a stage replica,
    the optimizer's update and recomputation are left out.

    Args:
        flops_per_s: the rate that a rank reaches, not the peak of its data sheet.
        link_bytes_per_s: the rate of one rank's link, in each direction.
    """
    slowest = max(range(plan.stage_replicas.widest), key=lambda d: (len(plan.micro_batches[d]), -d))
    computed = replica_timeline(plan, slowest, flops_per_s, link_bytes_per_s).makespan
    ranks = (
        plan.stage_replicas.rank(shard, slowest, stage)
        for shard in range(plan.stage_replicas.shards)
        for stage in range(plan.stage_replicas.pipeline)
    )
    widest = max(reduction_bytes(plan, r, precision=precision, exact=exact) for r in ranks)
    return computed + widest / link_bytes_per_s


def peak_activation_bytes(plan: Plan, rank: int) -> int:
    """The most bytes of activations that a rank's program keeps at once.

    A chunk's activations of a micro-batch are kept from its forward to its backward, or to its
    weight part if the backward is split.
    """
    chunk_bytes = {
        chunk: plan.activation_bytes(plan.chunk_layers[chunk]) for chunk in plan.chunks_of(rank)
    }
    return int(peak_in_flight(training_program(plan, rank), size=chunk_bytes.__getitem__))


def held_elements(plan: Plan, rank: int) -> int:
    """The number of parameters that a rank holds, in all of its chunks."""
    index = plan.stage_replicas.shard_index(rank)
    return sum(
        layer_elements(plan.layers[layer], index)
        for chunk in plan.chunks_of(rank)
        for layer in plan.layers_of(chunk)
    )


def _gradient_bytes(precision: Precision, exact: bool) -> int:
    return 8 if exact else precision.state.bytes


def rank_memory(
    plan: Plan, rank: int, *, precision: Precision, copies: int, exact: bool
) -> RankMemory:
    """The memory of one rank. Pure.

    Args:
        copies: the values that the optimizer keeps per owned parameter, the reduced gradient
            included.
        exact: whether gradients are summed as int64.
    """
    index = plan.stage_replicas.shard_index(rank)
    held = held_elements(plan, rank)
    owned = sum(plan.blocks[index][place].elements for _, place in plan.owned_blocks(rank))
    return RankMemory(
        parameters=held * precision.bytes,
        gradients=held * _gradient_bytes(precision, exact),
        optimizer=owned * precision.state.bytes * copies,
        activations=peak_activation_bytes(plan, rank),
    )


def layer_elements(layer: LayerSpec, shard_index: int) -> int:
    """The number of parameters of a layer on one rank of a stage replica."""
    return sum(spec.elements for spec in layer.parameters[shard_index])
