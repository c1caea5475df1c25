"""Jobs for the pool: Megatron-Core's own model and its dist_checkpointing, on CPU, over gloo."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

SIZES = {
    "layers": 4,
    "hidden": 16,
    "ffn": 24,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 45,
    "padded_vocab": 48,
    "max_len": 32,
}
ITERATION = 7


def start(rank: int, world_size: int, store: Store, tensor: int, pipeline: int) -> Any:
    """Megatron's groups over gloo; what it would ask of CUDA is answered without."""
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    return parallel_state


def build(tie: bool, parallel_state: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=SIZES["layers"],
        hidden_size=SIZES["hidden"],
        ffn_hidden_size=SIZES["ffn"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=SIZES["kv_heads"],
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=SIZES["padded_vocab"],
        max_sequence_length=SIZES["max_len"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tie,
        position_embedding_type="rope",
    )


def arguments(tensor: int, pipeline: int, tie: bool) -> argparse.Namespace:
    """What Megatron's training would keep of its command line, in part."""
    return argparse.Namespace(
        num_layers=SIZES["layers"],
        hidden_size=SIZES["hidden"],
        ffn_hidden_size=SIZES["ffn"],
        num_attention_heads=SIZES["heads"],
        group_query_attention=True,
        num_query_groups=SIZES["kv_heads"],
        kv_channels=SIZES["hidden"] // SIZES["heads"],
        vocab_size=SIZES["vocab"],
        padded_vocab_size=SIZES["padded_vocab"],
        max_position_embeddings=SIZES["max_len"],
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        untie_embeddings_and_output_weights=not tie,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        position_embedding_type="rope",
        rotary_base=10000,
        add_bias_linear=False,
        params_dtype=torch.float32,
        consumed_train_samples=56,
        iteration=ITERATION,
    )


def save(
    rank: int, world_size: int, store: Store, *, tensor: int, pipeline: int, root: str
) -> list[dict[str, Any]]:
    """Save an untied and a tied model in both of Megatron's forms.

    Returns:
        For each of the two: this rank's place, and its weights by their own names.
    """
    parallel_state = start(rank, world_size, store, tensor, pipeline)
    index = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found = []
    for tie in (False, True):
        model = build(tie, parallel_state)
        _fill(model, tie, index, stage)
        folder = Path(root) / ("tied" if tie else "untied")
        told = {
            "args": arguments(tensor, pipeline, tie),
            "iteration": ITERATION,
            "checkpoint_version": 3.0,
        }
        _save_torch_dist(model, folder / "dist", told)
        place = f"mp_rank_{index:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
        legacy = folder / "legacy" / f"iter_{ITERATION:07d}" / place
        legacy.mkdir(parents=True, exist_ok=True)
        state = dict(model.state_dict())
        torch.save(
            {**told, "model": state, "optimizer": {"step": 7}, "rng_state": [1]},
            legacy / "model_optim_rng.pt",
        )
        for form in ("dist", "legacy"):
            (folder / form / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        found.append({"tp": index, "pp": stage, "weights": weights})
    dist.barrier()
    return found


def _fill(model: Any, tie: bool, index: int, stage: int) -> None:
    """Random weights; the same on all ranks that hold copies."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        seed = 1000 * index + 100 * stage + number
        if "norm" in name:
            seed = 5000 + 100 * stage + number
        elif tie and ("word_embeddings" in name or "output_layer" in name):
            seed = 6000 + index
        generator = torch.Generator().manual_seed(seed)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def _save_torch_dist(model: Any, folder: Path, told: dict[str, Any]) -> None:
    """The model, and a moment of every weight: twice the weight."""
    from dataclasses import replace

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    sharded = model.sharded_state_dict()
    moments: dict[str, Any] = {}
    for name, value in sharded.items():
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            key = f"optimizer.state.exp_avg.{value.key}"
            doubled: Any = value.data
            doubled = doubled * 2
            moments[f"exp_avg.{name}"] = replace(value, key=key, data=doubled)
    place = folder / f"iter_{ITERATION:07d}"
    place.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({**sharded, **moments, **told}, str(place))
