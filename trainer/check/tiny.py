"""The same layout with a tiny model: every divisibility that matters is kept, every size is not."""

from __future__ import annotations

from math import gcd

import msgspec

from holdfast.trainer.config import RunConfig

_HEAD_DIM = 4
FRACTION_BITS = 54
"""Resolution 5.6e-17, range +-512: what exact mode rounds stays below float64's own rounding, which
AdamW magnifies where a gradient is nearly zero."""


def tiny_config(config: RunConfig, steps: int) -> RunConfig:
    """`config` at a size that a laptop replays in seconds, in float64.

    Kept: the layout and schedule, head grouping and how kv heads fall on tensor ranks, whether the
    vocabulary divides evenly, tied embeddings, dropout, recompute, optimizer settings, an uneven share
    of micro-batches. Pure.
    """
    parallel, model, train = config.parallel, config.model, config.train
    tensor = parallel.tensor
    kv_heads = _fewest_kv_heads(model.kv_heads, tensor)
    group = min(model.heads // model.kv_heads, 2)
    while (kv_heads * group) % tensor:
        group += 1
    heads = kv_heads * group
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
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(
            model,
            layers=sum(layers),
            hidden=heads * _HEAD_DIM * (2 if model.head_dim else 1),
            head_dim=_HEAD_DIM if model.head_dim else 0,
            intermediate=6 * tensor,
            heads=heads,
            kv_heads=kv_heads,
            vocab=12 * tensor + (0 if model.vocab % tensor == 0 else 1),
            max_seq_len=max(8, 4 * tensor),
        ),
        data=msgspec.structs.replace(config.data, kind="synthetic", path=[], weights=[]),
        train=msgspec.structs.replace(
            train,
            steps=steps,
            seq_len=max(8, 4 * tensor),
            global_batch=rows,
            micro_batch=micro_batch,
            precision="fp64",
            device="cpu",
            threads_per_rank=1,
            eval_every=0,
        ),
        optimizer=msgspec.structs.replace(
            config.optimizer,
            warmup_steps=min(1, steps - 1),
            lr=1e-3,
            min_lr=1e-4,
            block_elements=64,
        ),
        numerics=msgspec.structs.replace(config.numerics, fraction_bits=FRACTION_BITS),
        parallel=msgspec.structs.replace(
            parallel,
            backend="gloo",
            blocks_per_chunk=layers if parallel.blocks_per_chunk else [],
        ),
        log=msgspec.structs.replace(config.log, trace_steps=[], tensorboard=False),
    )


def _fewest_kv_heads(kv_heads: int, tensor: int) -> int:
    """The smallest count that falls on tensor ranks as `kv_heads` does: split, or shared by ranks."""
    if kv_heads % tensor == 0:
        return tensor * min(kv_heads // tensor, 2)
    return gcd(kv_heads, tensor)
