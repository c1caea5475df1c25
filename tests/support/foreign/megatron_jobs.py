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
from torch.overrides import TorchFunctionMode

SIZES = {
    "layers": 4,
    "hidden": 16,
    "ffn": 24,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 45,
    "padded_vocab": 48,
    "max_len": 32,
    "experts": 4,
    "expert_ffn": 20,
}
ITERATION = 7


def start(
    rank: int,
    world_size: int,
    store: Store,
    tensor: int,
    pipeline: int,
    expert: int = 1,
    virtual: int = 1,
) -> Any:
    """Megatron's groups over gloo; what it would ask of CUDA is answered without."""
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor if expert == 1 else 1,
    )
    return parallel_state


def build(
    tie: bool,
    parallel_state: Any,
    experts: int = 0,
    gpt2: bool = False,
    chunk: int | None = None,
    **settings: Any,
) -> Any:
    """The model of this rank, or one of its chunks."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=SIZES["layers"],
        hidden_size=SIZES["hidden"],
        ffn_hidden_size=4 * SIZES["hidden"] if gpt2 else SIZES["ffn"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=SIZES["heads"] if gpt2 else SIZES["kv_heads"],
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=(
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        add_bias_linear=gpt2,
        gated_linear_unit=not gpt2,
        activation_func=torch.nn.functional.gelu if gpt2 else torch.nn.functional.silu,
        normalization="LayerNorm" if gpt2 else "RMSNorm",
        **_expert_settings(experts, parallel_state),
        **settings,
    )
    spec: Any = get_gpt_layer_local_spec(
        num_experts=experts or None,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
    )
    if experts:
        # As with Transformer Engine: beside experts the norm is a layer of its own.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return GPTModel(
        config,
        spec,
        vocab_size=SIZES["padded_vocab"],
        max_sequence_length=SIZES["max_len"],
        pre_process=parallel_state.is_pipeline_first_stage(chunk is None, chunk),
        post_process=parallel_state.is_pipeline_last_stage(chunk is None, chunk),
        share_embeddings_and_output_weights=tie,
        position_embedding_type="learned_absolute" if gpt2 else "rope",
        vp_stage=chunk,
    )


def _expert_settings(experts: int, parallel_state: Any) -> dict[str, Any]:
    if not experts:
        return {}
    return {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": SIZES["expert_ffn"],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def arguments(tensor: int, pipeline: int, tie: bool, experts: int = 0) -> argparse.Namespace:
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
        num_experts=experts or None,
        moe_ffn_hidden_size=SIZES["expert_ffn"] if experts else None,
        moe_router_topk=2,
    )


def save(
    rank: int, world_size: int, store: Store, *, tensor: int, pipeline: int, root: str
) -> list[dict[str, Any]]:
    """Save an untied and a tied model and one of experts in Megatron's forms.

    Returns:
        For each of the three: this rank's place, and its weights by their own names.
    """
    parallel_state = start(rank, world_size, store, tensor, pipeline)
    index = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found = []
    for kind in ("untied", "tied", "experts"):
        tie, experts = kind == "tied", SIZES["experts"] if kind == "experts" else 0
        model = build(tie, parallel_state, experts)
        _fill(model, tie, index, stage)
        folder = Path(root) / kind
        told = {
            "args": arguments(tensor, pipeline, tie, experts),
            "iteration": ITERATION,
            "checkpoint_version": 3.0,
        }
        _save_torch_dist(model, folder / "dist", told, {})
        if experts:
            _save_torch_dist(model, folder / "single", told, {"singleton_local_shards": True})
        place = f"mp_rank_{index:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
        legacy = folder / "legacy" / f"iter_{ITERATION:07d}" / place
        legacy.mkdir(parents=True, exist_ok=True)
        state = dict(model.state_dict())
        torch.save(
            {**told, "model": state, "optimizer": {"step": 7}, "rng_state": [1]},
            legacy / "model_optim_rng.pt",
        )
        for form in ("dist", "legacy", "single"):
            if (folder / form).is_dir():
                (folder / form / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        found.append({"tp": index, "pp": stage, "weights": weights})
    finish(parallel_state)
    return found


def finish(parallel_state: Any) -> None:
    """Leave the worker ready for another job."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _fill(model: Any, tie: bool, index: int, stage: int) -> None:
    """Random weights; the same on all ranks that hold copies."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        seed = 1000 * index + 100 * stage + number
        if "norm" in name or "router" in name:
            seed = 5000 + 100 * stage + number
        elif tie and ("word_embeddings" in name or "output_layer" in name):
            seed = 6000 + index
        generator = torch.Generator().manual_seed(seed)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def _save_torch_dist(
    model: Any, folder: Path, told: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """The model, and a moment of every weight: twice the weight."""
    from dataclasses import replace

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    sharded = model.sharded_state_dict(metadata=dict(metadata))
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


class OnCpu(TorchFunctionMode):
    """Answers what Megatron's optimizer asks of CUDA with the processor."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        keys = dict(kwargs or {})
        if str(keys.get("device", "")).startswith("cuda"):
            keys["device"] = "cpu"
        if func is Tensor.type and len(args) == 1 and not keys:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **keys)


def load(
    rank: int,
    world_size: int,
    store: Store,
    *,
    tensor: int,
    pipeline: int,
    folder: str,
    expert: int = 1,
    experts: int = 0,
    optimizer: bool = False,
    tie: bool = False,
    gpt2: bool = False,
) -> dict[str, Any]:
    """Load a torch_dist folder into Megatron's model, and its distributed optimizer, as Megatron
    does.

    Returns:
        This rank's place; its weights, and the optimizer's states of each, by their own names; its
        step.
    """
    from megatron.core import dist_checkpointing

    parallel_state = start(rank, world_size, store, tensor, pipeline, expert)
    model = build(tie, parallel_state, experts, gpt2)
    common = dist_checkpointing.load_common_state_dict(folder)
    metadata: Any = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    sharded: dict[str, Any] = {"model": model.sharded_state_dict(metadata=dict(metadata))}
    found: dict[str, Any] = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "iteration": common["iteration"],
    }
    with OnCpu():
        made = _make_optimizer(model) if optimizer else None
        if made is not None:
            sharded["optimizer"] = made.sharded_state_dict(
                sharded["model"], is_loading=True, metadata=metadata
            )
        loaded: Any = dist_checkpointing.load(sharded, folder, strict="raise_unexpected")
        model.load_state_dict(loaded["model"])
        if made is not None:
            made.load_state_dict(loaded["optimizer"])
            found |= _states(made, model)
    state = model.state_dict()
    found["weights"] = {n: value for n, value in state.items() if isinstance(value, Tensor)}
    finish(parallel_state)
    return found


def load_legacy(
    rank: int,
    world_size: int,
    store: Store,
    *,
    tensor: int,
    pipeline: int,
    folder: str,
    tie: bool,
    gpt2: bool = False,
) -> dict[str, Any]:
    """Load this rank's file of a folder of mp_rank folders into Megatron's model, every name of it.

    Returns:
        This rank's place, and its weights by their own names.
    """
    parallel_state = start(rank, world_size, store, tensor, pipeline)
    model = build(tie, parallel_state, gpt2=gpt2)
    index = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    file = Path(folder) / f"mp_rank_{index:02d}_{stage:03d}/model_optim_rng.pt"
    torch.serialization.add_safe_globals([argparse.Namespace])
    content = torch.load(file, weights_only=True)
    model.load_state_dict(content["model"], strict=True)
    state = model.state_dict()
    finish(parallel_state)
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {"tp": index, "pp": stage, "weights": weights, "args": vars(content["args"])}


def _make_optimizer(model: Any) -> Any:
    """Megatron's distributed optimizer after a step, which makes its state."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_with_step(self: Any, model_param: Any, tensors: Any) -> None:
        # The counts of torch's Adam, which the fused ones that Megatron expects do not have.
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        set_states(self, model_param, {**tensors, "step": self.optimizer.state[main]["step"]})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_with_step
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
    )
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.1, use_distributed_optimizer=True
    )
    made = get_megatron_optimizer(settings, [ddp])
    ddp.zero_grad_buffer()
    made.step()
    return made


def _states(made: Any, model: Any) -> dict[str, Any]:
    [inner] = made.chained_optimizers
    found: dict[str, Any] = {"param": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in model.named_parameters():
        kept = inner._get_main_param_and_optimizer_states(parameter)
        for kind, value in kept.items():
            if kind in found:
                found[kind][name] = value.detach().reshape(parameter.shape).clone()
    found["step"] = inner.optimizer.param_groups[0]["step"]
    return found
