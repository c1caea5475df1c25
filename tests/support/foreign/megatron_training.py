"""Jobs for the pool: Megatron-Core's optimizers on CPU, saved and loaded as Megatron-LM does, a
file a rank.

The optimizers are Megatron's own, unchanged; its 16-bit one asks for types of CUDA, which tensors
are made to say they have (`OnCpu`). Gradients are drawn, not computed: its model's forward pass
needs CUDA.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from support.foreign.megatron_jobs import ITERATION, SIZES, OnCpu, arguments, build, finish, start

STEPS = 3
SCHEDULE = {
    "max_lr": 3e-3,
    "min_lr": 1e-4,
    "lr_warmup_steps": 16,
    "lr_decay_steps": 4096,
    "lr_decay_style": "cosine",
    "num_steps": 8 * STEPS,
    "start_wd": 0.1,
    "end_wd": 0.1,
    "wd_incr_style": "constant",
    "wd_incr_steps": 512,
}
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
_CUT = re.compile(r".*(word_embeddings|output_layer|linear_(qkv|proj|fc[12]))\.weight")
_CUT_BIAS = re.compile(r".*linear_(qkv|fc1)\.bias")


@dataclass(frozen=True, slots=True)
class Training:
    """How Megatron trains."""

    tensor: int = 2
    pipeline: int = 2
    virtual: int = 1
    tie: bool = False
    gpt2: bool = False
    half: bool = False
    query_key_norms: bool = False
    experts: int = 0
    decoupled: bool = False


class _Run:
    """One rank's model chunks and optimizer."""

    def __init__(self, rank: int, world_size: int, store: Store, how: Training) -> None:
        self.how = how
        self.state = start(rank, world_size, store, how.tensor, how.pipeline, virtual=how.virtual)
        self.index = self.state.get_tensor_model_parallel_rank()
        self.stage = self.state.get_pipeline_model_parallel_rank()
        self.chunks = [self._chunk(number) for number in range(how.virtual)]
        self.optimizer = self._optimizer()

    @property
    def place(self) -> str:
        """This rank's folder."""
        return f"mp_rank_{self.index:02d}" + (f"_{self.stage:03d}" if self.how.pipeline > 1 else "")

    def _chunk(self, number: int) -> Any:
        how = self.how
        model = build(
            how.tie,
            self.state,
            how.experts,
            how.gpt2,
            number if how.virtual > 1 else None,
            qk_layernorm=how.query_key_norms,
        )
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.draw(number, name, "weight", parameter))
        return model.bfloat16() if how.half else model

    def _optimizer(self) -> Any:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import (
            OptimizerConfig,
            get_megatron_optimizer,
            get_standard_config_overrides,
        )

        config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.wrapped: list[Any] = [
            DistributedDataParallel(chunk.config, config, chunk) for chunk in self.chunks
        ]
        settings = OptimizerConfig(
            optimizer="adam",
            lr=2e-3,
            min_lr=1e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=self.how.half,
            clip_grad=0.0,
            decoupled_lr=5e-3 if self.how.decoupled else None,
            apply_wd_to_qk_layernorm=self.how.query_key_norms,
        )
        return get_megatron_optimizer(
            settings, self.wrapped, get_standard_config_overrides(settings)
        )

    def draw(self, chunk: int, name: str, what: str, like: Tensor) -> Tensor:
        """Numbers that depend on the parameter alone, wherever it lies; the same for copies."""
        full = self.full_name(chunk, name)
        if self.how.tie and full == "output_layer.weight":
            full = "embedding.word_embeddings.weight"
        cut = _CUT if not self.how.gpt2 else re.compile(f"{_CUT.pattern}|{_CUT_BIAS.pattern}")
        index = self.index if cut.fullmatch(full) else 0
        seed = zlib.crc32(f"{full}/{index}/{what}".encode())
        drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        if full in ("embedding.word_embeddings.weight", "output_layer.weight"):
            # A conversion strips the padding of the vocabulary.
            drawn[max(0, SIZES["vocab"] - index * len(drawn)) :] = 0
        return drawn

    def full_name(self, chunk: int, name: str) -> str:
        """Across all stages, as interleaved chunks share the layers."""
        layer = _LAYER.fullmatch(name)
        if layer is None:
            return name
        each = SIZES["layers"] // (self.how.pipeline * self.how.virtual)
        before = (chunk * self.how.pipeline + self.stage) * each
        return f"{layer[1]}{int(layer[2]) + before}{layer[3]}"

    def step(self, number: int) -> None:
        """One step, with gradients that depend on its number."""
        for chunk, model in enumerate(self.chunks):
            for name, parameter in model.named_parameters():
                grad = self.draw(chunk, name, f"grad {number}", parameter)
                parameter.main_grad.copy_(grad)
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """By name across all stages."""
        return {
            self.full_name(chunk, name): parameter.detach().clone()
            for chunk, model in enumerate(self.chunks)
            for name, parameter in model.named_parameters()
        }

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizer holds for each parameter, found by the parameter itself."""
        found: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "master": {}}
        for chunk, model in enumerate(self.chunks):
            for name, parameter in model.named_parameters():
                full = self.full_name(chunk, name)
                main = parameter.main_param if self.how.half else parameter
                kept = self.optimizer.optimizer.state[main]
                found["exp_avg"][full] = kept["exp_avg"].clone()
                found["exp_avg_sq"][full] = kept["exp_avg_sq"].clone()
                found["master"][full] = main.detach().clone()
        return found

    def shard(self, **kinds: dict[str, Tensor]) -> dict[str, Any]:
        """This rank's place and what it holds, by kind."""
        return {"tp": self.index, "pp": self.stage, **kinds}


def train(
    rank: int, world_size: int, store: Store, *, how: Training, folder: str
) -> dict[str, Any]:
    """Train a few steps and save; train one more.

    Returns:
        This rank's weights and states as they were saved, and its weights after that ("next");
        layers count across all stages.
    """
    with OnCpu():
        run = _Run(rank, world_size, store, how)
        for number in range(STEPS):
            run.step(number)
        told = arguments(how.tensor, how.pipeline, how.tie, how.experts)
        if how.gpt2:
            told.swiglu, told.add_bias_linear, told.normalization = False, True, "LayerNorm"
            told.position_embedding_type = "learned_absolute"
            told.num_query_groups = told.num_attention_heads
            told.ffn_hidden_size = 4 * told.hidden_size
        told.apply_wd_to_qk_layernorm = how.query_key_norms
        chunks = [model.state_dict_for_save_checkpoint() for model in run.wrapped]
        content: dict[str, Any] = {
            "args": told,
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            **{
                f"model{number if how.virtual > 1 else ''}": dict(chunk)
                for number, chunk in enumerate(chunks)
            },
            "optimizer": run.optimizer.state_dict(),
            "opt_param_scheduler": SCHEDULE,
        }
        place = Path(folder) / f"iter_{ITERATION:07d}" / run.place
        place.mkdir(parents=True, exist_ok=True)
        torch.save(content, place / "model_optim_rng.pt")
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        found = run.shard(weights=run.weights(), **run.states())
        run.step(STEPS)
        found["next"] = run.weights()
    finish(run.state)
    return found


def resume(
    rank: int, world_size: int, store: Store, *, how: Training, folder: str
) -> dict[str, Any]:
    """Load an iteration into a fresh model and its optimizer, every name of it, and train one step.

    Returns:
        This rank's weights and states as they were loaded, and its weights after the step ("next").
    """
    with OnCpu():
        run = _Run(rank, world_size, store, how)
        file = Path(folder) / run.place / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        for number, model in enumerate(run.wrapped):
            key = f"model{number if how.virtual > 1 else ''}"
            model.load_state_dict(content[key], strict=True)
        run.optimizer.load_state_dict(content["optimizer"])
        found = run.shard(weights=run.weights(), **run.states())
        run.step(STEPS)
        found["next"] = run.weights()
    finish(run.state)
    return {**found, "iteration": content["iteration"]}


def resume_dist(
    rank: int, world_size: int, store: Store, *, how: Training, folder: str
) -> dict[str, Any]:
    """The same for a torch_dist folder."""
    from megatron.core import dist_checkpointing

    with OnCpu():
        run = _Run(rank, world_size, store, how)
        [model] = run.chunks
        metadata = {"chained_optim_avoid_prefix": True}
        sharded: dict[str, Any] = {"model": model.sharded_state_dict(metadata=dict(metadata))}
        sharded["optimizer"] = run.optimizer.sharded_state_dict(
            sharded["model"], is_loading=True, metadata=metadata
        )
        loaded: Any = dist_checkpointing.load(sharded, folder, strict="raise_unexpected")
        model.load_state_dict(loaded["model"])
        run.optimizer.load_state_dict(loaded["optimizer"])
        found = run.shard(weights=run.weights(), **run.states())
        run.step(STEPS)
        found["next"] = run.weights()
    finish(run.state)
    return {**found, "iteration": loaded["iteration"]}
