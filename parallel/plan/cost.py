"""The costs of a plan, estimated before it runs: memory by rank, bubble and step time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.parallel.layout import LayerSpec
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.precision import Precision
from holdfast.parallel.schedules import Action, Op, Timeline, peak_in_flight, simulate

PACKED_BYTES = 5
"""The bytes of a packed integer sum that estimates assume: 4.1 to 5.2 were measured."""
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


@dataclass(frozen=True, slots=True)
class ExchangedBytes:
    """The bytes that one rank sends to its replicas in a step."""

    gradients: float
    """Sums, to the owners of their blocks."""
    parameters: float
    """Updated parameters, to their holders."""


def exchanged_bytes(
    plan: Plan, rank: int, *, precision: Precision, exact: bool, packing: bool = True
) -> ExchangedBytes:
    """The bytes a rank sends to its replicas in a step, without followers. Pure.

    With balanced owners each is (D - 1) / D of the rank's parameters, for D replicas.
    """
    place = plan.stage_replicas.find(rank)
    if place is None:
        return ExchangedBytes(0.0, 0.0)
    replicas = plan.stage_replicas.replicas(place.pipeline)
    sent = held_elements(plan, rank) * (replicas - 1) / replicas
    sums = PACKED_BYTES if exact and packing else _gradient_bytes(precision, exact)
    return ExchangedBytes(sent * sums, sent * precision.bytes)


def step_time_s(
    plan: Plan,
    *,
    precision: Precision,
    exact: bool,
    flops_per_s: float,
    link_bytes_per_s: float,
    packing: bool = True,
    overlap: bool = True,
) -> float:
    """An estimate of a step's seconds: the slowest replica's pipeline, then the longest exchange.

    With `overlap`, gradients travel beside the last micro-batch's backward pass and parameters
    beside the first forward pass, and only what takes longer than these counts. The collectives
    inside a stage replica, the optimizer's update and recomputation are left out.

    Args:
        flops_per_s: the rate that a rank reaches, not the peak of its data sheet.
        link_bytes_per_s: the rate of one rank's link, in each direction.
    """
    slowest = max(range(plan.stage_replicas.widest), key=lambda d: (len(plan.micro_batches[d]), -d))
    computed = replica_timeline(plan, slowest, flops_per_s, link_bytes_per_s).makespan
    cost = action_cost(plan, flops_per_s)

    def exchange_s(rank: int) -> float:
        sent = exchanged_bytes(plan, rank, precision=precision, exact=exact, packing=packing)
        beside_s = dict.fromkeys((Op.FORWARD, Op.BACKWARD), 0.0)
        for op in beside_s if overlap else ():
            beside_s[op] = sum(cost(Action(op, chunk, 0)) for chunk in plan.chunks_of(rank))
        return max(0.0, sent.gradients / link_bytes_per_s - beside_s[Op.BACKWARD]) + max(
            0.0, sent.parameters / link_bytes_per_s - beside_s[Op.FORWARD]
        )

    ranks = (
        plan.stage_replicas.rank(shard, slowest, stage)
        for shard in range(plan.stage_replicas.shards)
        for stage in range(plan.stage_replicas.pipeline)
    )
    return computed + max(map(exchange_s, ranks))


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
