"""Builds the parts of one rank's training from its configuration and plan."""

from __future__ import annotations

import torch

from holdfast.parallel.comm import Communicator
from holdfast.parallel.pipeline import Chunk
from holdfast.parallel.plan import Plan
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig
from holdfast.trainer.models import build_chunk


def new_chunks(
    config: RunConfig,
    plan: Plan,
    rank: int,
    tensor: Communicator,
    device: torch.device,
    *,
    initial: bool,
) -> dict[int, Chunk]:
    """The model chunks of one rank of a run, by chunk index. Arguments as of `build_chunk`. Local."""
    train = config.train
    group = tensor if tensor.size > 1 else None
    return {
        index: build_chunk(
            config.model,
            plan.layers_of(index),
            tensor=group,
            sequence_parallel=config.parallel.sequence_parallel and group is not None,
            dtype=PRECISIONS[train.precision].dtype,
            device=device,
            seq_len=train.seq_len,
            micro_batch=train.micro_batch,
            recompute=[layer.recompute for layer in plan.layers[1:-1]],
            seed=train.seed,
            initial=initial,
        )
        for index in plan.chunks_of(rank)
    }
