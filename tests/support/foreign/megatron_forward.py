"""A job for the pool: what Megatron-Core's own model computes from a torch_dist folder, on CPU.

The model is built from the arguments in the folder as Megatron-LM builds it from its command line
(`core_transformer_config_from_args`, `gpt_builder`), with layers of Megatron's own: Transformer
Engine's need CUDA. Of latent attention Megatron-Core 0.16 has no core of its own beside Transformer
Engine's: torch's attention stands in its place, and norms get the keys that Transformer Engine's
layers have, as Megatron's own layers give them for other attention.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
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


_LATENT_NAMES = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_base",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "mtp_num_layers",
)
_TE_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_DENSE_NORM = "mlp.linear_fc1.layer_norm_"
"""The keys of norms that lie in Transformer Engine's linear layers."""


class _PlainAttention(torch.nn.Module):
    """Causal attention of float[seq, batch, heads, elements] by torch."""

    def __init__(self, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self._scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """The values by the scores, float[seq, batch, heads * elements]."""
        queries, keys, values = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=self._scale
        )
        return found.permute(2, 0, 1, 3).flatten(2)


def logits(
    rank: int, world_size: int, store: Store, *, folder: str, tokens: list[list[int]], saved: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of tokens, float[batch, seq, padded_vocab], and weights by Megatron's names.

    Args:
        saved: a new folder, to which Megatron saves the model.
    """
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
        Path(saved).mkdir()
        told = {name: common[name] for name in ("args", "iteration", "checkpoint_version")}
        dist_checkpointing.save({**sharded, **told}, saved, content_metadata=dict(metadata))
        ids = torch.tensor(tokens)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        # The layers that predict further tokens need labels, and change no logits.
        model.mtp_process, model.config.mtp_num_layers = False, None
        found = model(ids, positions, None).float()
        weights = {n: w.clone() for n, w in model.state_dict().items() if isinstance(w, Tensor)}
    finish(parallel_state)
    return found, weights


def _model(told: dict[str, Any]) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    if told.get("multi_latent_attention"):
        return _latent_model(told)
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


def _latent_model(told: dict[str, Any]) -> Any:
    """A DeepSeek-V3, with the layers that predict further tokens."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    multi_latent_attention.HAVE_TE = False
    moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    same = {name: told[name] for name in (*_SAME_NAMES, *_LATENT_NAMES) if name in told}
    config: Any = MLATransformerConfig(
        **same,
        **_settings(told),
        num_moe_experts=told["num_experts"],
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
    )
    spec: Any = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    for number, layer in enumerate(spec.layer_specs):
        layer.submodules.self_attention.submodules.core_attention = _PlainAttention
        layer.submodules.sharded_state_dict_keys_map = {
            **_TE_KEYS,
            **({} if told["moe_layer_freq"][number] else {"pre_mlp_layernorm.": _DENSE_NORM}),
        }
    further: Any = (
        get_gpt_mtp_block_spec(config, spec, False) if told.get("mtp_num_layers") else None
    )
    return GPTModel(
        config,
        spec,
        vocab_size=told["padded_vocab_size"],
        max_sequence_length=told["max_position_embeddings"],
        share_embeddings_and_output_weights=not told["untie_embeddings_and_output_weights"],
        position_embedding_type=told["position_embedding_type"],
        mtp_block_spec=further,
    )
