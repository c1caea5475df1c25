"""The costs of a plan, estimated before it runs: memory by rank, bubble and step time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.parallel.plan.buffers import PACKED_BYTES, buffer_bytes
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import own_program, training_program
from holdfast.parallel.plan.sharding import (
    KEPT_KINDS,
    KeptKind,
    keeping,
    shard_group,
    shards,
    use_order,
)
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
    """Those of owned blocks of other parts included."""
    gradients: int
    """The sums that the rank keeps: int64 in exact mode."""
    optimizer: int
    """Reduced gradients, and the optimizer's kinds of state, of the blocks that this rank owns."""
    activations: int
    """Activations at the fullest moment of a step."""
    buffers: int
    """Gradients and messages under way, and layers of shared parameters; see `buffer_bytes`. What
    attention keeps between stretches."""

    @property
    def total(self) -> int:
        kept = self.parameters + self.gradients + self.optimizer
        return kept + self.activations + self.buffers


def action_cost(plan: Plan, flops_per_s: float = 1.0) -> Callable[[Action], float]:
    """The time of a compute action, by its chunk's operations; a backward takes two forwards."""
    chunk_flops, attention_flops = (
        [
            sum(getattr(plan.layers[layer], kind) for layer in plan.layers_of(chunk))
            / plan.configured_mesh.shards
            for chunk in range(len(plan.placement))
        ]
        for kind in ("forward_flops", "attention_flops")
    )
    parts = plan.stretches

    def cost(action: Action) -> float:
        flops, attention = chunk_flops[action.chunk], attention_flops[action.chunk]
        if action.stretch is not None:
            # A token attends to those before it: as many more as its stretch is later.
            attention_here = attention * (2 * action.stretch + 1) / parts**2
            flops = (flops - attention) / parts + attention_here
        return flops * _BACKWARD_SHARE.get(action.op, 0.0) / flops_per_s

    return cost


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
    return plan.layers[plan.layers_of(producer)[-1]].output_bytes // plan.stretches


@dataclass(frozen=True, slots=True)
class ExchangedBytes:
    """The bytes that one rank sends to its replicas in a step."""

    gradients: float
    """Sums, to the owners of their blocks, at the end."""
    parameters: float
    """Updated parameters, to their other keepers, before the next step."""
    shared_gradients: float = 0.0
    """Each micro-batch's gradients, to the ranks that keep their sums."""
    shared_parameters: float = 0.0
    """Parameters, before each pass that uses them."""


def exchanged_bytes(
    plan: Plan, rank: int, *, precision: Precision, exact: bool, packing: bool = True
) -> ExchangedBytes:
    """The bytes a rank sends to its replicas in a step, without followers. Pure.

    With balanced owners, D ranks that keep the same blocks send (D - 1) / D of these, and so do the
    ranks of a group that share a layer.
    """
    place = plan.stage_replicas.find(rank)
    if place is None:
        return ExchangedBytes(0.0, 0.0)
    held = held_elements(plan, rank)
    alone = _alone_elements(plan, rank)
    holders = len(plan.ranks_of(plan.parts_of(rank)[:1], place.pipeline))
    sums = PACKED_BYTES if exact and packing else _gradient_bytes(precision, exact)
    sizes = {kept: len(shard_group(plan, rank, kept).ranks) for kept in KEPT_KINDS}

    split = sum(
        row.spec.elements
        for layer in plan.layers_at(rank)
        for row in plan.rows_of(rank, layer)
        if row.spec.whole not in (None, row.spec.box)
    )
    owning = len(plan.ranks_of(tuple(range(plan.configured_mesh.parts)), place.pipeline))

    def between(kept: KeptKind) -> float:
        """The elements that go between the keepers of a block, in different groups, and to the
        owners of split matrices, which any rank of the stage may be."""
        groups = max(1, holders // sizes[kept])
        owner_of_split = holders / owning / groups  # how often it keeps a block that it owns
        copied = (held - alone - split) * (groups - 1) / groups
        return (copied + split * (1 - owner_of_split)) / sizes[kept]

    def within(kept: KeptKind, elements: int) -> float:
        return elements * (sizes[kept] - 1) / sizes[kept]

    used = use_order(plan, training_program(plan, rank)) if sizes["parameters"] > 1 else ()
    passes = len(plan.micro_batches_of(place.pipeline, place.data))
    return ExchangedBytes(
        between("gradients") * sums,
        between("parameters") * precision.bytes,
        within("gradients", held * passes) * precision.bytes,
        within("parameters", sum(layer_elements(plan, rank, layer) for layer in used))
        * precision.bytes,
    )


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
    beside the first forward pass, and only what takes longer than these counts; what ranks share
    travels beside all passes. The collectives inside a stage replica, the optimizer's update and
    recomputation are left out.

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
        shared = (sent.shared_gradients + sent.shared_parameters) / link_bytes_per_s
        return (
            max(0.0, sent.gradients / link_bytes_per_s - beside_s[Op.BACKWARD])
            + max(0.0, sent.parameters / link_bytes_per_s - beside_s[Op.FORWARD])
            + max(0.0, shared - computed * overlap)
        )

    ranks = (
        plan.stage_replicas.rank(shard, slowest, stage)
        for stage in range(plan.stage_replicas.pipeline)
        for shard in range(plan.stage_replicas.sizes(stage)[slowest])
    )
    return computed + max(map(exchange_s, ranks))


def peak_activation_bytes(plan: Plan, rank: int) -> int:
    """The most bytes of activations that a rank's program keeps at once.

    A chunk's activations of a micro-batch are kept from its forward to its backward, or to its
    weight part if the backward is split.
    """
    share = plan.configured_mesh.shards / plan.mesh_of(rank).shards
    chunk_bytes = {
        chunk: share * plan.activation_bytes(plan.chunk_layers[chunk])
        for chunk in plan.chunks_of(rank)
    }
    return int(peak_in_flight(own_program(plan, rank), size=chunk_bytes.__getitem__))


def between_stretches_bytes(plan: Plan, rank: int) -> int:
    """The most bytes that attention keeps between the stretches of micro-batches. Pure.

    From the first forward of a micro-batch to its last backward, the first stretch's.
    """
    if plan.stretches == 1:
        return 0
    share = plan.configured_mesh.shards / plan.mesh_of(rank).shards
    chunk_bytes = {
        chunk: share * sum(plan.layers[layer].keys_bytes for layer in plan.layers_of(chunk))
        for chunk in plan.chunks_of(rank)
    }
    firsts = tuple(action for action in own_program(plan, rank) if action.stretch == 0)
    return int(peak_in_flight(firsts, until="input", size=chunk_bytes.__getitem__))


def held_elements(plan: Plan, rank: int) -> int:
    """The number of parameters that a rank holds, in all of its chunks."""
    return sum(layer_elements(plan, rank, layer) for layer in plan.layers_at(rank))


def _alone_elements(plan: Plan, rank: int) -> float:
    """The part of a rank's parameters that no other rank has: of experts with fewer copies than
    there are replicas."""
    if not plan.spreads_experts:
        return 0.0
    found = 0.0
    for layer in plan.layers_at(rank):
        hosts = plan.hosts(layer)
        for *_, spec in plan.rows_of(rank, layer):
            if spec.expert is not None:
                found += spec.elements / len(hosts[spec.expert])
    return found


def kept_elements(plan: Plan, rank: int, kept: KeptKind) -> int:
    """The number of parameters that a rank keeps, or whose sums it keeps, at all uses. Pure."""
    if not shards(plan, kept):
        return held_elements(plan, rank)
    keeps = keeping(plan, rank, kept)
    return sum(
        block.elements
        for layer in plan.layers_at(rank)
        for _, part, row, _ in plan.rows_of(rank, layer)
        for block in plan.blocks_of(layer, part, row)
        if keeps(block, layer)
    )


def _gradient_bytes(precision: Precision, exact: bool) -> int:
    return 8 if exact else precision.state.bytes


def rank_memory(
    plan: Plan,
    rank: int,
    *,
    precision: Precision,
    owned_bytes: int,
    exact: bool,
    activations: int | None = None,
) -> RankMemory:
    """The memory of one rank. Pure.

    Args:
        owned_bytes: what the optimizer keeps per owned parameter, the reduced gradient included.
        exact: whether gradients are summed as int64.
        activations: `peak_activation_bytes` of a rank of its stage replica, which is its own; None:
            it is computed.
    """
    if activations is None:
        activations = peak_activation_bytes(plan, rank)
    own = plan.owned_blocks(rank)
    owned = sum(plan.block(key).elements for key in own)
    guests = sum(plan.block(key).elements for key in own if plan.is_guest(key))
    sent = exchanged_bytes(plan, rank, precision=precision, exact=exact).gradients
    sent /= PACKED_BYTES if exact else _gradient_bytes(precision, exact)
    return RankMemory(
        parameters=(kept_elements(plan, rank, "parameters") + guests) * precision.bytes,
        gradients=kept_elements(plan, rank, "gradients") * _gradient_bytes(precision, exact),
        optimizer=owned * owned_bytes,
        activations=activations,
        buffers=buffer_bytes(plan, rank, precision=precision, exact=exact, sent=sent)
        + between_stretches_bytes(plan, rank),
    )


def layer_elements(plan: Plan, rank: int, layer: int) -> int:
    """The number of parameters of a layer that a rank holds."""
    return sum(row.spec.elements for row in plan.rows_of(rank, layer))
