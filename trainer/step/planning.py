"""The plan of a run, from its configuration. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal

from holdfast.parallel.layout import Box, LayerSpec
from holdfast.parallel.offload import Rates, choose_layers
from holdfast.parallel.optimizer import OPTIMIZERS
from holdfast.parallel.plan import Plan, held_blocks, make_plan, on_shards, rank_memory
from holdfast.trainer.config import RunConfig
from holdfast.trainer.models import family_of, further_losses_of, layer_specs, windows_of
from holdfast.trainer.step.saved_tensors import state_format

WAYS = ("none", "selective", "full")
"""The recomputed parts of a transformer layer, from nothing to all of it."""


def layers_of_config(config: RunConfig) -> tuple[LayerSpec, ...]:
    """The model's layers as the plan sees them. Pure.

    Raises:
        ConfigError: train.recompute = "auto" finds no choice that fits in train.activation_gib.
    """
    train, offload = config.train, config.offload
    if train.recompute != "auto":
        return _layers(config, train.recompute)
    ways = {way: _layers(config, way) for way in WAYS}
    plan = _first_plan(config, ways["none"])
    sends = offload.activations != "none"
    chosen = choose_layers(
        plan,
        {way: on_shards(layers, plan.configured_mesh) for way, layers in ways.items()},
        most_bytes=train.activation_gib * 2**30,
        rates=Rates(
            flops_per_s=train.tflops * 1e12,
            drive_bytes_per_s=offload.drive_gbytes * 1e9,
            most_share=offload.most_share if sends else 0.0,
        ),
    )
    return _layers(config, [layer.recompute for layer in chosen[1:-1]])


def _layers(config: RunConfig, recompute: str | Sequence[str]) -> tuple[LayerSpec, ...]:
    layers = layer_specs(
        config.model,
        tensor=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence_parallel and config.parallel.tensor > 1,
        seq_len=config.train.seq_len,
        micro_batch=config.train.micro_batch,
        precision=config.train.precision,
        recompute=recompute,
        vocab_chunk=config.train.vocab_chunk,
        shards=config.numerics.tensor_shards,
    )
    if OPTIMIZERS[config.optimizer.name].matrices is None:
        return layers
    first, *transformer, last = layers
    if further_losses_of(config.model):  # the head has a transformer layer
        vocabulary = {spec.name for spec in first.parameters[0]} | {"lm_head.weight"}
        last = with_matrices(last, vocabulary)
    return (first, *map(with_matrices, transformer), last)


def with_matrices(layer: LayerSpec, others: Collection[str] = ()) -> LayerSpec:
    """A transformer layer whose matrices are updated as such, also where parts have boxes of one.

    Pure.

    Args:
        others: the names of tensors that are not, as they belong to no transformer layer.
    """
    found: dict[tuple[int, str], Box] = {}
    for table in layer.parameters:
        for row, spec in enumerate(table):
            if len(spec.shape) == 2 and spec.decay and spec.name not in others:
                key = row, spec.name  # one tensor may have several matrices, in rows of their own
                found[key] = found.get(key, spec.box).around(spec.box)
    tables = tuple(
        tuple(
            replace(spec, whole=spec.whole or found.get((row, spec.name)))
            for row, spec in enumerate(table)
        )
        for table in layer.parameters
    )
    return replace(layer, parameters=tables)


def plan_of(config: RunConfig, generation: int = 0) -> Plan:
    """The plan of a run: equal on every rank, without communication.

    Raises:
        ConfigError: the layout does not fit the model or the batch, or no choice of what to
            recompute fits in memory.
    """
    return _first_plan(config, layers_of_config(config), generation)


def context_exchange(config: RunConfig) -> Literal["heads", "keys", "ring"]:
    """What the ranks of a context group exchange. Pure."""
    parallel = config.parallel
    if parallel.context_exchange != "auto":
        return parallel.context_exchange
    if config.model.heads % (config.tensor_parts * parallel.context) == 0:
        return "heads"
    needs_keys = any(windows_of(config.model)) or config.optimizer.qk_clip > 0
    if config.numerics.reduction == "exact" or needs_keys:
        return "keys"
    return "ring"


def shadows_in_host_memory(config: RunConfig, device: str) -> bool:
    """Whether copies of other ranks' optimizer state lie in host memory. Pure.

    Args:
        device: "cpu" or "cuda"; "auto", for an unknown device, counts as "cuda".
    """
    wanted = config.elastic.shadow_memory
    return wanted == "host" or (wanted == "auto" and device != "cpu")


def _first_plan(config: RunConfig, layers: tuple[LayerSpec, ...], generation: int = 0) -> Plan:
    parallel, train = config.parallel, config.train
    order = parallel.micro_batch_order
    if train.batch_ramp and order == "ascending":
        order = "dealt"  # the micro-batches of a smaller batch are spread over all replicas
    plan = make_plan(
        layers,
        config.mesh,
        virtual=parallel.virtual,
        schedule=parallel.schedule,
        micro_batches=train.global_batch // train.micro_batch,
        block_elements=config.optimizer.block_elements,
        blocks_per_chunk=parallel.blocks_per_chunk or None,
        micro_batch_order=order,
        activation_headroom=config.elastic.activation_headroom,
        shard=parallel.shard,
        shard_group=parallel.shard_group,
        generation=generation,
    )
    slots = 0
    if parallel.expert_replicas == "auto":
        once = -(-family_of(config.model.family).experts(config.model) // parallel.expert)
        slots = parallel.expert_slots or 2 * once
    return plan.evolved(
        stretches=parallel.stretches,
        expert_ranks=parallel.expert,
        expert_copies=1 if parallel.expert_replicas == "auto" else parallel.expert_replicas,
        expert_slots=slots,
    )


def device_bytes(config: RunConfig) -> int:
    """What the optimizer keeps per owned parameter in a device's memory. Pure.

    On a GPU's host lies what a CPU has in the same memory.
    """
    form = state_format(config)
    on_host = form.on_host and config.train.device != "cpu"
    return form.precision.state.bytes if on_host else form.owned_bytes


def room_of(config: RunConfig, rank_bytes: int) -> Callable[[Plan, int], bool] | None:
    """Whether a rank's memory suffices for its part in a plan, by an estimate. Pure.

    Args:
        rank_bytes: the memory of a rank; 0: not known.
    Returns:
        None if nothing limits it.
    """
    most = int(config.elastic.rank_memory_gib * 2**30) or rank_bytes
    if not most:
        return None
    form, on_cpu = state_format(config), config.train.device == "cpu"
    followed_bytes = form.precision.state.bytes + form.held_bytes

    def has_room(plan: Plan, rank: int) -> bool:
        memory = rank_memory(
            plan,
            rank,
            precision=form.precision,
            owned_bytes=device_bytes(config),
            exact=config.numerics.reduction == "exact",
        )
        needed = memory.total
        if config.offload.activations != "none":
            needed -= memory.activations
        if on_cpu or not shadows_in_host_memory(config, config.train.device):
            followed = held_blocks(plan, (rank,))[rank].difference(plan.owned_blocks(rank))
            needed += followed_bytes * sum(plan.block(key).elements for key in followed)
        return needed <= most

    return has_room
