"""The configuration of a run: one frozen struct per section of the TOML file."""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.trainer.data.config import DataConfig
from holdfast.trainer.model.config import ModelConfig


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TrainConfig(_Section):
    steps: int = 100
    seq_len: int = 128
    global_batch: int = 16
    micro_batch: int = 2
    seed: int = 1234
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    clip_grad_norm: float = 1.0
    recompute: Literal["none", "full", "selective"] = "none"
    threads_per_rank: int = 1
    device: str = "auto"
    eval_every: int = 0
    eval_batches: int = 8


class OptimizerConfig(_Section):
    name: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 10
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    block_elements: int = 1048576


class NumericsConfig(_Section):
    reduction: Literal["exact", "fast"] = "exact"
    fraction_bits: int = 44
    nonfinite: Literal["error", "skip"] = "error"


class ParallelConfig(_Section):
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    virtual: int = 1
    schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"] = "1f1b"
    sequence_parallel: bool = True
    backend: Literal["auto", "gloo", "nccl", "mpi"] = "auto"
    blocks_per_chunk: list[int] = []
    micro_batch_order: Literal["ascending", "descending", "shuffled"] = "ascending"


class CheckpointConfig(_Section):
    every: int = 0
    keep: int = 3
    path: str = ""
    policy: Literal["wait", "skip"] = "wait"
    verify: bool = True


class OffloadConfig(_Section):
    activations: Literal["none", "ssd", "host"] = "none"
    path: str = ""
    limit_gib: float = 0


class ElasticConfig(_Section):
    enabled: bool = False
    redundancy: int = 1
    min_ranks: int = 1
    heartbeat_ms: int = 100
    heartbeat_timeout_ms: int = 600
    hang_timeout_s: float = 10
    respawn: bool = True
    verify_every: int = 100
    local_nodes: int = 1
    lighthouse: str = ""


class LogConfig(_Section):
    every: int = 1
    tensorboard: bool = True
    trace_steps: list[int] = []


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a run depends on."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    numerics: NumericsConfig = NumericsConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    offload: OffloadConfig = OffloadConfig()
    elastic: ElasticConfig = ElasticConfig()
    log: LogConfig = LogConfig()
