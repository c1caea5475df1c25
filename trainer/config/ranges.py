"""The range of every number in a configuration; one line per number outside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from holdfast.parallel.layout import AXES

if TYPE_CHECKING:
    from holdfast.trainer.config.sections import RunConfig

AT_LEAST_ONE: Mapping[str, tuple[str, ...]] = {
    "model": ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab", "max_seq_len"),
    "train": ("steps", "seq_len", "global_batch", "micro_batch", "threads_per_rank"),
    "optimizer": ("block_elements",),
    "parallel": (*AXES, "virtual"),
    "checkpoint": ("memory_keep", "remote_every"),
    "offload": ("smallest_kib", "staging_mib"),
    "log": ("every",),
}
AT_LEAST_ZERO: Mapping[str, tuple[str, ...]] = {
    "model": ("head_dim", "init_std"),
    "train": ("seed", "clip_grad_norm", "eval_every", "stop_after", "activation_gib", "tflops"),
    "optimizer": ("min_lr", "warmup_steps", "weight_decay"),
    "checkpoint": ("every", "every_seconds", "keep", "memory_every", "remote_keep", "arena_mib"),
    "offload": ("limit_gib", "least_share", "limit_mib_per_s", "drive_gbytes", "drive_tbw"),
    "data": ("seed",),
}
ABOVE_ZERO: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("lr", "eps"),
    "model": ("norm_eps",),
    "checkpoint": ("timeout_s", "exit_s"),
}


def range_problems(config: RunConfig) -> Iterator[str]:
    """One line per number outside its range: the key, its value, what is allowed. Pure."""
    for least, table in ((1, AT_LEAST_ONE), (0, AT_LEAST_ZERO)):
        for key, value in _values(config, table):
            if not value >= least:
                yield f"{key} = {value}: must be {least} or more"
    for key, value in _values(config, ABOVE_ZERO):
        if not (value > 0 and math.isfinite(value)):
            yield f"{key} = {value}: must be greater than 0"
    yield from _other_ranges(config)


def _values(config: RunConfig, table: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, float]]:
    for section, keys in table.items():
        for key in keys:
            yield f"{section}.{key}", getattr(getattr(config, section), key)


def _other_ranges(config: RunConfig) -> Iterator[str]:
    for number, beta in enumerate(config.optimizer.betas):
        if not 0 <= beta < 1:
            yield f"optimizer.betas[{number}] = {beta}: must be at least 0 and less than 1"
    if not 0 <= config.model.dropout < 1:
        yield f"model.dropout = {config.model.dropout}: must be at least 0 and less than 1"
    if not 8 <= config.numerics.fraction_bits <= 60:
        yield (
            f"numerics.fraction_bits = {config.numerics.fraction_bits}: must be 8 to 60; the range "
            "of a gradient sum is 2**(63 - fraction_bits)"
        )
    if config.train.eval_every and config.train.eval_batches < 1:
        yield f"train.eval_batches = {config.train.eval_batches}: must be 1 or more with eval_every"
    for step in config.log.trace_steps:
        if step < 1:
            yield f"log.trace_steps has {step}: steps are counted from 1"
