"""The construction of one rank's training from its configuration and plan. Local."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import Groups
from holdfast.parallel.context_parallel import ContextParallel
from holdfast.parallel.layout import Box, Slices, contributing_parts, slices_of, unit_rows
from holdfast.parallel.offload import Offloader
from holdfast.parallel.optimizer import (
    ExchangeSettings,
    GradientAccumulator,
    KeptSpans,
    LayerParameters,
    OwnedState,
    ParameterArrival,
    ParameterBuffer,
    ParameterGroups,
    ShadowCopies,
    ShadowState,
    ShardedOptimizer,
    kept_spans,
)
from holdfast.parallel.pipeline import (
    Chunk,
    Executor,
    ExpertInputs,
    ExpertTeam,
    MessageShape,
    MicroBatchContext,
    ModelChunkRunner,
    Passage,
    receive_order,
)
from holdfast.parallel.plan import Plan, block_box, message_units, shards
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.schedules import Action, Op, Program
from holdfast.parallel.tensor_parallel import TensorParallel
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import Dataset, open_dataset
from holdfast.trainer.models import Weights, build_chunk, initial_values
from holdfast.trainer.step.planning import context_exchange, shadows_in_host_memory
from holdfast.trainer.step.saved_tensors import state_format

PreparedProgram = tuple[Program, Mapping[Action, int]]
"""A rank's program, and the order of its peers' sends to it; see `receive_order`."""


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The modules of one rank, and the buffers of their parameters and gradient sums."""

    chunks: Mapping[int, Chunk]
    """The chunks by chunk index, in forward order."""
    buffer: ParameterBuffer
    accumulator: GradientAccumulator
    arrival: ParameterArrival
    """Awaits gathered parameters before the chunks use them."""
    layers: LayerParameters | None = None
    """The memory of each layer's parameters, if replicas share these; else they lie in `buffer`."""

    def offers(
        self,
        program: Program,
        parts: Sequence[int],
        hosted: int | None = None,
        lost: Mapping[tuple[int, int | None], int] | None = None,
    ) -> dict[nn.Parameter, int]:
        """The number of gradients that each parameter is offered by a program. Pure.

        Args:
            parts: the parts of the parameters that the rank holds.
            hosted: the micro-batches of the rank's team, for which its experts work; None: they
                work for those of the program.
            lost: by layer and expert, the gradients that come apart from the program.
        """
        apart = lost or {}
        ends = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
        # Every stretch of a micro-batch goes backward, and all of them have its slices.
        backwards = Counter(
            a.chunk
            for a in program
            if a.op in ends and a.stretch in (None, 0) and a.micro_batch >= 0
        )
        slices = self.accumulator.slices
        return {
            parameter: hosted * slices.count + apart.get((row.layer, row.spec.expert), 0)
            if hosted is not None and row.spec.expert is not None
            else backwards[index] * len(slices.own) * len(contributing_parts(row, parts))
            for index, chunk in self.chunks.items()
            for row, parameter in chunk.rows()
        }


def open_split(config: RunConfig, split: str) -> Dataset:
    """The data of a split of a run, "train" or "eval"."""
    return open_dataset(
        config.data,
        vocab=config.model.vocab,
        seq_len=config.train.seq_len,
        seed=config.data.seed or config.train.seed,
        split=split,
        before=config.train.samples_before,
    )


def new_chunks(
    config: RunConfig,
    plan: Plan,
    rank: int,
    groups: Groups,
    device: torch.device,
    *,
    weights: Weights,
) -> dict[int, Chunk]:
    """The model chunks of one rank, by chunk index. The arguments are those of `build_chunk`."""
    train, tensor = config.train, groups["tensor"]
    group = tensor if tensor.size > 1 else None
    return {
        index: build_chunk(
            config.model,
            plan.layers_of(index),
            plan.layers,
            tensor_parallel=TensorParallel(
                group,
                config.parallel.sequence_parallel and group is not None,
                config.numerics.tensor_shards,
                config.numerics.tensor_strips,
                config.parallel.strips_per_message,
            ),
            dtype=PRECISIONS[train.precision].dtype,
            device=device,
            seq_len=train.seq_len,
            seed=train.seed,
            weights=weights,
            compiles=train.compile,
            context_parallel=context_parallel(config, groups),
            experts=hosted_experts(plan, rank),
        )
        for index in plan.chunks_of(rank)
    }


def hosted_experts(plan: Plan, rank: int) -> dict[int, tuple[int, ...]] | None:
    """By layer, the experts that a rank has; None: those of its parts. Pure."""
    if not plan.spreads_experts:
        return None
    return {layer: plan.experts_of(rank, layer) for layer in plan.layers_at(rank)}


def expert_team(
    config: RunConfig, plan: Plan, rank: int, groups: Groups, before: ExpertTeam | None
) -> ExpertTeam | None:
    """The ranks among which a rank's tokens go to experts; None: those of its tensor group.

    Args:
        before: the team of the plan before, whose inputs of experts are carried over.
    """
    if not plan.spreads_experts or plan.stage_replicas.find(rank) is None:
        return None
    ranks = plan.team_of_rank(rank)
    place = {member: index for index, member in enumerate(ranks)}
    replicas = [
        (plan.stage_replicas.coordinates(member).data, plan.mesh_of(member).along(shard)["context"])
        for member in ranks
        for shard in (plan.stage_replicas.shard_index(member),)
    ]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(replicas))}
    hosts = {
        layer: tuple(
            tuple(place[host] for host in of_expert if host in place)
            for of_expert in plan.hosts(layer)
        )
        for layer in plan.layers_at(rank)
    }
    slices = (len(run_slices(config, plan, member).own) for member in ranks)
    group = groups["experts"] if len(ranks) > 1 else None
    most = max(slices) // plan.stretches
    joins = config.numerics.reduction == "fast"
    sources = tuple(numbers[source] for source in replicas)
    inputs = None if before is None else before.inputs
    if inputs is None and config.elastic.enabled and not shards(plan, "gradients"):
        inputs = ExpertInputs(int(config.elastic.expert_inputs_gib * 2**30))
    return ExpertTeam(group, sources, hosts, most, joins, inputs)


def context_parallel(config: RunConfig, groups: Groups) -> ContextParallel:
    """The split of sequences between the ranks of a rank's context group."""
    group = groups.axes.get("context")
    exchange = context_exchange(config)
    return ContextParallel(group if group is not None and group.size > 1 else None, exchange)


def run_slices(config: RunConfig, plan: Plan, rank: int) -> Slices:
    """The slices of a run's sequences, and those that a rank computes."""
    mesh, train = plan.mesh_of(rank), config.train
    here = mesh.along(plan.stage_replicas.shard_index(rank))
    return slices_of(
        train.seq_len, train.context_chunks, mesh["context"], here["context"], plan.stretches
    )


def new_model(
    config: RunConfig,
    plan: Plan,
    rank: int,
    groups: Groups,
    device: torch.device,
    *,
    initial: bool,
    before: ParameterBuffer | None = None,
) -> ModelParts:
    """A rank's chunks with their buffers.

    Args:
        initial: whether the parameters are drawn. Else they are zero, to be filled from elsewhere,
            and sums have no memory before a step begins.
        before: the parameters of the plan before; those that are here as well are taken over.
    """
    shares = shards(plan, "parameters")
    drawn = initial and not shares
    weights: Weights = "drawn" if drawn else "none"
    chunks = new_chunks(config, plan, rank, groups, device, weights=weights)
    buffer = ParameterBuffer(
        [row for chunk in chunks.values() for row in chunk.rows()],
        dtype=PRECISIONS[config.train.precision].dtype,
        device=device,
        keep=kept_spans(plan, rank, "parameters") if shares else None,
        filled=drawn,
        before=None if shares else before,
    )
    accumulator = GradientAccumulator(
        buffer,
        exact=config.numerics.reduction == "exact",
        fraction_bits=config.numerics.fraction_bits,
        queues=[chunk.queue for chunk in chunks.values()],
        kept=KeptSpans([]) if shards(plan, "gradients") else None,  # the optimizer says what
        slices=run_slices(config, plan, rank),
        released=not initial,
    )
    arrival = ParameterArrival()
    if not shares:
        for chunk in chunks.values():
            arrival.watch(chunk)
        return ModelParts(chunks, buffer, accumulator, arrival)
    if initial:
        initialize_kept(buffer, config.train.seed)
    modules = {
        layer: module for chunk in chunks.values() for layer, module in chunk.modules_by_layer()
    }
    layers = LayerParameters(buffer, modules, arrival)
    return ModelParts(chunks, buffer, accumulator, arrival, layers)


def initialize_kept(buffer: ParameterBuffer, seed: int) -> None:
    """Draw the parameters that a rank keeps: the same values as if it kept all of them."""
    for segment, (first, last), values in buffer.kept_rows(buffer.kept, buffer.part):
        box = segment.spec.box
        start, stop = box.start[0] + first, box.start[0] + last
        rows = Box((start, *box.start[1:]), (stop, *box.stop[1:]))
        drawn = initial_values(replace(segment.spec, box=rows), seed, values.dtype)
        values.copy_(drawn.reshape(-1))


def carried_model(model: ModelParts, before: Plan, plan: Plan, rank: int) -> ModelParts | None:
    """A rank's model under the next plan, if its layers, and what it keeps of them, stay.

    Else None. Pure. The ranks of its stage replica have stayed.
    """
    if shards(plan, "parameters"):
        kept = kept_spans(plan, rank, "parameters")(model.buffer.segments)
        if model.buffer.kept != kept:
            return None
    old, new = ([found.layers_of(c) for c in found.chunks_of(rank)] for found in (before, plan))
    if old != new or hosted_experts(before, rank) != hosted_experts(plan, rank):
        return None
    chunks = dict(zip(plan.chunks_of(rank), model.chunks.values(), strict=True))
    return replace(model, chunks=chunks)


def new_runners(
    model: ModelParts,
    last_chunk: int,
    *,
    context: Callable[[Passage], MicroBatchContext],
    before_gradients: Callable[[int], None],
    watch: Callable[[int, Passage, Tensor, bool], None],
) -> dict[int, ModelChunkRunner]:
    """The runner of each chunk. The arguments are those of `ModelChunkRunner`.

    Args:
        watch: that of each, with the number of its chunk before.
    """
    return {
        index: ModelChunkRunner(
            chunk,
            is_last=index == last_chunk,
            context=context,
            before_gradients=before_gradients,
            watch=partial(watch, index),
        )
        for index, chunk in model.chunks.items()
    }


def new_executor(
    config: RunConfig,
    runners: Mapping[int, ModelChunkRunner],
    plan: Plan,
    rank: int,
    groups: Groups,
    device: torch.device,
    offloader: Offloader | None,
) -> Executor:
    """The executor of a rank's chunks."""
    train, last_chunk = config.train, len(plan.placement) - 1
    mesh, shard = plan.mesh_of(rank), plan.stage_replicas.shard_index(rank)
    units = mesh.token_units[shard]
    of_unit = train.seq_len // plan.stretches // mesh.units
    shape = (len(units) * of_unit, train.micro_batch, config.model.hidden)

    def rows_of(peer: int, sends: bool) -> tuple[slice, ...] | None:
        if plan.mesh_of(peer) == mesh:
            return None
        return unit_rows(units, message_units(plan, rank, peer, sends=sends), of_unit)

    message = MessageShape(shape, PRECISIONS[train.precision].dtype, device, rows_of)
    micro_batches = train.global_batch // train.micro_batch
    return Executor(
        runners,
        last_chunk,
        message,
        groups["pipeline"],
        micro_batches,
        offloader,
        plan.stretches,
    )


def new_optimizer(
    config: RunConfig,
    plan: Plan,
    rank: int,
    model: ModelParts,
    groups: Groups,
    shadows: ShadowState | None,
    before: OwnedState | None,
    *,
    initial: bool,
) -> ShardedOptimizer:
    """The optimizer of a rank's blocks; usable state of `before` is reused.

    Args:
        initial: whether the model has its initial weights.
    """
    form, parallel = state_format(config), config.parallel
    rounds = parallel.reduce_dtype != "auto"
    reduce_dtype = PRECISIONS[parallel.reduce_dtype].dtype if rounds else None
    optimizer = ShardedOptimizer(
        plan,
        rank,
        model.buffer,
        model.accumulator,
        groups,
        form,
        ParameterGroups.of(form.rule, config.optimizer),
        arrival=model.arrival,
        shadows=shadows,
        exchange=ExchangeSettings(
            parallel.overlap, parallel.bucket_elements, parallel.packing, reduce_dtype
        ),
        before=before,
    )
    if initial:
        _initialize_guests(optimizer, config.train.seed)
    return optimizer


def _initialize_guests(optimizer: ShardedOptimizer, seed: int) -> None:
    """Draw the parameters of the owned blocks that are of parts that the rank does not hold."""
    guests = [number for number, block in enumerate(optimizer.owned) if block.is_guest]
    for number in guests:
        block, values = optimizer.owned[number], optimizer.parameters(number)
        box = block_box(block.spec, block.block)
        values.copy_(initial_values(replace(block.spec, box=box), seed, values.dtype).reshape(-1))
    if guests:
        optimizer.restart()


def new_shadows(
    config: RunConfig,
    plan: Plan,
    rank: int,
    device: torch.device,
    before: ShadowCopies | None,
) -> ShadowState:
    """A rank's copies of other ranks' blocks; usable ones of `before` are reused."""
    form = state_format(config)
    return ShadowState(
        plan,
        rank,
        device=device,
        form=form,
        groups=ParameterGroups.of(form.rule, config.optimizer),
        bucket_elements=config.parallel.bucket_elements,
        in_host_memory=shadows_in_host_memory(config, device.type),
        before=before,
    )


def prepared(rank: int, program_of: Callable[[int], Program]) -> PreparedProgram:
    """A rank's program, and the order of its peers' sends to it. Pure.

    Args:
        program_of: returns each rank's program of one step.
    """
    program = program_of(rank)
    peers = {action.peer for action in program if action.peer is not None}
    return program, receive_order(program, {p: program_of(p) for p in peers}, rank)
