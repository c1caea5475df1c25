"""A job for the pool: what Megatron-Core's own model computes from a torch_dist folder, on CPU.

The model is built from the arguments in the folder as Megatron-LM builds it from its command line
(`core_transformer_config_from_args`, `gpt_builder`), with layers of Megatron's own: Transformer
Engine's need CUDA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from support.foreign.megatron_jobs import OnCpu, finish, start

_SAME_NAMES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "window_size",
)
"""The arguments that are fields of Megatron's configuration under the same name."""


class _NoGenerators:
    """Stands for the states of CUDA's generators: an evaluated model draws nothing."""

    def fork(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()


def logits(
    rank: int, world_size: int, store: Store, *, folder: str, tokens: list[list[int]]
) -> Tensor:
    """The logits of tokens, float[batch, seq, padded_vocab]."""
    from megatron.core import dist_checkpointing, tensor_parallel

    tensor_parallel.get_cuda_rng_tracker = _NoGenerators  # type: ignore[assignment]
    parallel_state = start(rank, world_size, store, 1, 1)
    with OnCpu(), torch.no_grad():
        common: Any = dist_checkpointing.load_common_state_dict(folder)
        model = _model(vars(common["args"])).eval()
        metadata: Any = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        sharded = {"model": model.sharded_state_dict(metadata=dict(metadata))}
        loaded: Any = dist_checkpointing.load(sharded, folder, strict="raise_unexpected")
        model.load_state_dict(loaded["model"])
        ids = torch.tensor(tokens)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        found = model(ids, positions, None).float()
    finish(parallel_state)
    return found


def _model(told: dict[str, Any]) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    same = {name: told[name] for name in _SAME_NAMES if name in told}
    config: Any = TransformerConfig(**same, **_settings(told))
    if told["position_embedding_type"] == "yarn":
        for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"):
            setattr(config, f"yarn_{name}", told[name])
        for name, value in told.items():
            if name.startswith("yarn_"):
                setattr(config, name, value)
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm"),
        vocab_size=told["padded_vocab_size"],
        max_sequence_length=told["max_position_embeddings"],
        share_embeddings_and_output_weights=not told["untie_embeddings_and_output_weights"],
        position_embedding_type=told["position_embedding_type"],
        rotary_percent=told["rotary_percent"],
        rotary_base=told["rotary_base"],
        rope_scaling=told["use_rope_scaling"],
        rope_scaling_factor=told.get("rope_scaling_factor", 8.0),
    )


def _settings(told: dict[str, Any]) -> dict[str, Any]:
    return {
        "layernorm_epsilon": told["norm_epsilon"],
        "gated_linear_unit": told["swiglu"],
        "activation_func": torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
    }
