"""What a plain training loop takes from a run's configuration: its batches and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import open_dataset
from support.runs.sequences import windows_of


def batches_of(config: RunConfig, sizes: Sequence[int] = ()) -> Callable[[int], Tensor]:
    """step -> int64[global_batch, seq + 1].

    Args:
        sizes: the batch of each step; empty: the configuration's.
    """
    train = config.train
    own = sizes or [train.global_batch] * train.steps
    data = open_dataset(
        config.data, vocab=config.model.vocab, seq_len=train.seq_len, seed=train.seed
    )

    def batch(step: int) -> Tensor:
        first = sum(own[:step])
        rows = [windows_of(data.sample(first + row)) for row in range(own[step])]
        return torch.from_numpy(np.concatenate(rows))

    return batch


def rates_of(config: RunConfig) -> Callable[[int], float]:
    """step -> linear warm-up and cosine decay, written anew."""
    train, optimizer = config.train, config.optimizer

    def rate(step: int) -> float:
        if step < optimizer.warmup_steps:
            return optimizer.lr * (step + 1) / optimizer.warmup_steps
        part = (step - optimizer.warmup_steps) / (train.steps - 1 - optimizer.warmup_steps)
        half = (optimizer.lr - optimizer.min_lr) / 2
        return optimizer.min_lr + half * (1 + math.cos(math.pi * part))

    return rate
