"""The same layout with a tiny model: sizes shrink, the divisibility that matters stays."""

from __future__ import annotations

from math import lcm

import msgspec

from holdfast.parallel.optimizer import OPTIMIZERS
from holdfast.trainer.config import DataConfig, OptimizerConfig, RunConfig
from holdfast.trainer.models import family_of
from holdfast.trainer.step import context_exchange

FRACTION_BITS = 54
"""The resolution is 5.6e-17, the range +-512. So the rounding of exact mode stays below that of
float64, which AdamW magnifies where a gradient is nearly zero."""
_RATE = 1e-3
"""The learning rate; those of groups are in proportion."""

_LOGIT = 1e-3
"""The limit of logits, which those of initial weights exceed."""


def tiny_config(config: RunConfig, steps: int) -> RunConfig:
    """The configuration at a size that a laptop replays in seconds, in float64. Pure.

    These stay: the layout and schedule, head grouping, the distribution of kv heads over tensor
    ranks, whether the vocabulary divides evenly, tied embeddings, dropout, recompute, the slices of
    a sequence, whether sequences have documents, whether logits are computed by chunks, optimizer
    settings, an uneven number of micro-batches.
    """
    parallel, model, train = config.parallel, config.model, config.train
    chunks = parallel.pipeline * parallel.virtual
    layers = [min(count, 1) for count in parallel.blocks_per_chunk] or [1] * chunks
    if parallel.blocks_per_chunk and len(set(parallel.blocks_per_chunk)) > 1:
        layers = [min(count, 2) for count in parallel.blocks_per_chunk]
    micro_batches = train.global_batch // train.micro_batch
    wanted = min(micro_batches, max(parallel.data + 1, 2 * parallel.pipeline))
    if micro_batches % parallel.data == 0:
        wanted = max(wanted // parallel.data, 1) * parallel.data
    micro_batch = min(train.micro_batch, 2)
    rows = wanted * micro_batch
    parts = config.tensor_parts
    exchange = context_exchange(config) if parallel.context > 1 else parallel.context_exchange
    divisor = parts * parallel.context if exchange == "heads" else parts
    tiny = family_of(model.family).tiny(model, parts, sum(layers), divisor)
    if 0 < (count := getattr(tiny, "experts", 0)) < parallel.expert:  # each of its ranks has one
        tiny = msgspec.structs.replace(tiny, experts=-(-parallel.expert // count) * count)
    unit = lcm(parts, config.numerics.tensor_strips) * train.context_chunks
    seq_len = -(-max(8, 4 * parts) // unit) * unit
    if train.context_chunks > 1:  # exact mode has slices of whole vectors
        seq_len = lcm(seq_len, 8 * train.context_chunks)
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(tiny, max_seq_len=max(tiny.max_seq_len, seq_len)),
        data=DataConfig(
            seed=config.data.seed,
            packing="concatenated" if config.data.packing == "concatenated" else "documents",
        ),
        train=msgspec.structs.replace(
            train,
            steps=steps,
            seq_len=seq_len,
            global_batch=rows,
            batch_ramp=[],
            length_ramp=[],
            micro_batch=micro_batch,
            precision="fp64",
            vocab_chunk=5 if train.vocab_chunk else 0,
            device="cpu",
            threads_per_rank=1,
            eval_every=0,
        ),
        optimizer=_optimizer(config.optimizer, steps),
        numerics=msgspec.structs.replace(config.numerics, fraction_bits=FRACTION_BITS),
        parallel=msgspec.structs.replace(
            parallel,
            backend="gloo",
            context_exchange=exchange,
            blocks_per_chunk=layers if parallel.blocks_per_chunk else [],
        ),
        log=msgspec.structs.replace(config.log, trace_steps=[], tensorboard=False),
    )


def _optimizer(optimizer: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The optimizer's settings with a learning rate for a few steps. Pure."""
    return msgspec.structs.replace(
        optimizer,
        warmup_steps=min(1, steps - 1),
        lr=_RATE,
        min_lr=1e-4,
        decay_steps=0,
        lr_stages=[],
        groups=[
            group
            if group.lr is None
            else msgspec.structs.replace(group, lr=_RATE * group.lr / optimizer.lr)
            for group in optimizer.groups
        ],
        block_elements=64,
        qk_clip=_LOGIT if optimizer.qk_clip else 0.0,
        **OPTIMIZERS[optimizer.name].in_checks,
    )
