"""The range of every number in a configuration; one line per number outside it.

Upper bounds are far above what is trained today. They keep a slip of the pen, such as 10^18 layers,
from taking a machine's memory before it is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.parallel.errors import shown
from holdfast.parallel.layout import AXES

if TYPE_CHECKING:
    from holdfast.trainer.config.sections import RunConfig


@dataclass(frozen=True, slots=True)
class Range:
    """The allowed values of a number."""

    least: float
    most: float
    is_open: bool = False
    """Whether `least` itself is not allowed."""
    or_zero: bool = False
    """Whether 0 is allowed too, with a meaning of its own."""
    of: str = ""
    """What is counted, where the key's name does not say it."""


_COUNT = 2**53
"""Larger counts are not exact as the floating-point numbers of other programs' JSON."""
_DAY_S = 86400.0
_STEPS = Range(0, _COUNT)
_DURATION_S = Range(0, 366 * _DAY_S, is_open=True)
_RATE = Range(1e-6, 1e9, or_zero=True)
"""TFLOP/s, GB/s or MiB/s; a smaller rate makes times that no computer counts."""
_GIB = Range(0, 2**30)

RANGES: Mapping[str, Mapping[str, Range]] = {
    "model": {
        "layers": Range(1, 4096),
        "hidden": Range(1, 2**20),
        "intermediate": Range(1, 2**22),
        "heads": Range(1, 2**16),
        "kv_heads": Range(1, 2**16),
        "head_dim": Range(0, 2**16),
        "vocab": Range(1, 2**27),
        "max_seq_len": Range(1, 2**31),
        "dropout": Range(0, 1),
        "norm_eps": Range(0, 1, is_open=True),
        "rope_theta": Range(0, 1e15, is_open=True),
        "init_std": Range(0, 1e3),
        "experts": Range(1, 2**16),
        "experts_per_token": Range(1, 2**10),
        "expert_intermediate": Range(1, 2**22),
        "shared_experts": Range(0, 2**10),
        "expert_groups": Range(1, 2**16),
        "groups_per_token": Range(1, 2**16),
        "router_scale": Range(0, 1e6, is_open=True),
        "router_bias_speed": Range(0, 1),
        "query_rank": Range(0, 2**22),
        "key_value_rank": Range(1, 2**22),
        "plain_head_dim": Range(0, 2**16),
        "rope_head_dim": Range(2, 2**16),
        "value_head_dim": Range(1, 2**16),
        "router_aux_loss_coef": Range(0, 1e6),
        "router_z_loss_coef": Range(0, 1e6),
        "multi_token_layers": Range(0, 4096),
        "multi_token_loss_coef": Range(0, 1e6),
        "sliding_window": Range(0, 2**31),
        "max_window_layers": Range(0, 4096),
    },
    "data": {
        "seed": Range(0, 2**63 - 1),
        "packing_buffer": Range(1, 2**40),
        "fim_rate": Range(0, 1),
        "fim_spm_rate": Range(0, 1),
    },
    "train": {
        "steps": Range(1, _COUNT),
        "stop_after": _STEPS,
        "seq_len": Range(1, 2**31),
        "global_batch": Range(1, 2**24),
        "micro_batch": Range(1, 2**20),
        "seed": Range(0, 2**63 - 1),
        "clip_grad_norm": Range(0, 1e30),
        "activation_gib": _GIB,
        "tflops": _RATE,
        "vocab_chunk": Range(0, 2**27),
        "z_loss_coef": Range(0, 1e6),
        "context_chunks": Range(1, 2**16),
        "threads_per_rank": Range(1, 4096),
        "eval_every": _STEPS,
        "eval_batches": Range(0, 2**31),
    },
    "optimizer": {
        "lr": Range(0, 1e30, is_open=True),
        "min_lr": Range(0, 1e30),
        "warmup_steps": _STEPS,
        "decay_steps": _STEPS,
        "eps": Range(0, 1e30, is_open=True),
        "weight_decay": Range(0, 1e30),
        "ema": Range(0, 1),
        "qk_clip": Range(0, 1e30),
        "block_elements": Range(1, 2**40),
    },
    "numerics": {
        "fraction_bits": Range(8, 60),
        "nonfinite_limit": Range(0, _COUNT),
        "spike_window": Range(4, 4096, or_zero=True),
        "spike_sigmas": Range(0, 1e6, is_open=True),
        "spike_limit": Range(0, _COUNT),
        "tensor_shards": Range(1, 2**10),
        "tensor_strips": Range(1, 2**16),
    },
    "parallel": {axis: Range(1, 2**20) for axis in (*AXES, "expert")}
    | {
        "strips_per_message": Range(1, 2**16),
        "virtual": Range(1, 4096),
        "stretches": Range(1, 2**16),
        "bucket_elements": Range(1, 2**40),
        "shard_group": Range(0, 2**20),
        "expert_replicas": Range(1, 2**20),
        "expert_slots": Range(0, 2**20),
    },
    "checkpoint": {
        "every": _STEPS,
        "every_seconds": Range(0, 366 * _DAY_S),
        "keep": Range(0, 2**31),
        "keep_best": Range(0, 2**31),
        "memory_every": _STEPS,
        "memory_keep": Range(1, 2**31),
        "remote_every": Range(1, _COUNT),
        "remote_keep": Range(0, 2**31),
        "arena_mib": Range(0, 2**20),
        "timeout_s": _DURATION_S,
        "exit_s": _DURATION_S,
        "retry_s": Range(0, 366 * _DAY_S),
    },
    "offload": {
        "limit_gib": _GIB,
        "least_share": Range(0, 1),
        "most_share": Range(0, 1),
        "smallest_kib": Range(1, 2**30),
        "limit_mib_per_s": _RATE,
        "staging_mib": Range(1, 1024),
        "drive_gbytes": _RATE,
        "drive_tbw": Range(0, 1e9),
    },
    "elastic": {
        "redundancy": Range(0, 2, of="shadows per block"),
        "min_ranks": Range(1, 2**20),
        "heartbeat_ms": Range(10, 60_000),
        "heartbeat_timeout_ms": Range(30, 3_600_000),
        "hang_timeout_s": _DURATION_S,
        "startup_grace_s": Range(0, 366 * _DAY_S),
        "apart_s": _DURATION_S,
        "verify_every": _STEPS,
        "rewind": Range(0, 4096),
        "audit_every": _STEPS,
        "local_nodes": Range(1, 2**20),
        "activation_headroom": Range(0, 1e6, of="of the fullest rank's activation memory"),
        "rank_memory_gib": _GIB,
        "straggler_every": _STEPS,
        "expert_inputs_gib": _GIB,
        "expert_steps": Range(1, _COUNT),
        "straggler_factor": Range(1, 1e6, is_open=True),
        "slow_link_factor": Range(1, 1e6, is_open=True),
    },
    "log": {"every": Range(1, _COUNT), "norms_every": _STEPS, "digests_every": _STEPS},
}
"""By section and key. A number without an entry must be finite: `data.eval_fraction`, which
check_data_config checks, and the own key of an optimizer."""

_TABLES: Mapping[str, Mapping[str, Range]] = {
    "data.stages": {"start": Range(1, _COUNT)},
    "data.without": {"start": _STEPS},
    "train.batch_ramp": {"until": Range(1, _COUNT), "global_batch": Range(1, 2**24)},
    "train.length_ramp": {"until": Range(1, _COUNT), "seq_len": Range(1, 2**31)},
    "optimizer.groups": {key: RANGES["optimizer"][key] for key in ("lr", "weight_decay", "eps")},
    "optimizer.lr_stages": {
        "start": Range(1, _COUNT),
        **{key: RANGES["optimizer"][key] for key in ("lr", "min_lr")},
        **{key: RANGES["optimizer"][key] for key in ("warmup_steps", "decay_steps")},
    },
    "elastic.chaos": {
        "rank": Range(0, 2**20),
        "step": Range(1, _COUNT),
        "seconds": Range(0, 366 * _DAY_S),
        "factor": Range(1, 1e6),
        "incarnation": Range(0, 2**31),
    },
}
"""By the key of a list of tables: the ranges of their keys."""


def range_problems(config: RunConfig) -> Iterator[str]:
    """One line per number outside its range: the key, its value, what is allowed. Pure."""
    for section in config.__struct_fields__:
        values, table = getattr(config, section), RANGES.get(section, {})
        for key in values.__struct_fields__:
            allowed = table.get(key, Range(-math.inf, math.inf))
            yield from _problems(f"{section}.{key}", getattr(values, key), allowed)
    for name, table in _TABLES.items():
        section, _, listed = name.partition(".")
        for number, row in enumerate(getattr(getattr(config, section), listed)):
            for key, allowed in table.items():
                yield from _problems(f"{name}[{number}].{key}", getattr(row, key), allowed)
    yield from _other_ranges(config)


def _problems(name: str, value: Any, allowed: Range) -> Iterator[str]:
    """The problem of one key, if its value is a number. Pure."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if value == 0 and allowed.or_zero:
        return
    of = f" {allowed.of}" if allowed.of else ""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} = {value}: must be a finite number"
    elif allowed.is_open and value <= allowed.least:
        yield f"{name} = {shown(value)}: must be greater than {allowed.least:g}"
    elif value < allowed.least:
        zero = "0, or " if allowed.or_zero else ""
        yield f"{name} = {shown(value)}: must be {zero}{allowed.least:g} or more{of}"
    elif value > allowed.most:
        yield f"{name} = {shown(value)}: must be at most {_shown(allowed.most)}{of}"


def _shown(most: float) -> str:
    return str(most) if isinstance(most, int) else f"{most:g}"


def _other_ranges(config: RunConfig) -> Iterator[str]:
    groups = enumerate(config.optimizer.groups)
    of_groups = {f"optimizer.groups[{n}].betas": group.betas or () for n, group in groups}
    for name, betas in {"optimizer.betas": config.optimizer.betas, **of_groups}.items():
        for number, beta in enumerate(betas):
            if not 0 <= beta < 1:
                yield f"{name}[{number}] = {beta}: must be at least 0 and less than 1"
    if config.model.dropout == 1:
        yield f"model.dropout = {config.model.dropout}: must be at least 0 and less than 1"
    if config.train.eval_every and config.train.eval_batches < 1:
        yield f"train.eval_batches = {config.train.eval_batches}: must be 1 or more with eval_every"
    for place, removal in enumerate(config.data.without):
        for number in removal.samples:
            if not 0 <= number <= _COUNT:
                yield (
                    f"data.without[{place}].samples has {shown(number)}: samples are counted from 0"
                )
    for key, least, rule in (
        ("trace_steps", 1, "steps are counted from 1"),
        ("operation_steps", 1, "steps are counted from 1"),
        ("operation_values", 0, "operations are counted from 0"),
    ):
        for number in getattr(config.log, key):
            if not least <= number <= _COUNT:
                yield f"log.{key} has {shown(number)}: {rule}"
