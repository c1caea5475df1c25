"""DeepSeek-V3 in config.json's words and in Megatron's: latent attention, experts, further tokens.

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from holdfast.checkpoint.convert.formats.megatron.rope import odd_rope, rope_arguments, rope_of

HONOURED: Final = frozenset(
    {
        "moe_layer_freq",
        "moe_router_enable_expert_bias",
        "moe_router_group_topk",
        "moe_router_num_groups",
        "moe_router_score_function",
        "moe_router_topk_scaling_factor",
        "moe_shared_expert_intermediate_size",
        "mtp_num_layers",
        "multi_latent_attention",
        "rotary_scaling_factor",
    }
)
"""Megatron's arguments that change the function and that this model has words for."""
_NEEDED: Final[Mapping[str, Any]] = {
    "multi_latent_attention": True,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_layernorm": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_epsilon": 1e-6,
}
"""The values that the model has. transformers has this epsilon in norms of latent vectors,
whatever config.json says, and Megatron one for all norms."""
_NEVER: Final = ("add_bias_linear", "add_qkv_bias")
_GROUPED: Final = 2
"""The best experts of a group, by whose scores transformers chooses groups."""
_YARN: Final = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
"""The settings of YaRN that latent attention has in Megatron without arguments for them."""


def odd_latent_arguments(arguments: Mapping[str, Any]) -> Iterator[str]:
    """What keeps the arguments of a model with latent attention from being a DeepSeek-V3."""
    told = arguments.get
    for key, value in _NEEDED.items():
        if told(key) != value:
            yield f"{key} = {told(key)!r} (accepted is {value!r} with latent attention)"
    for key in _NEVER:
        if told(key):
            yield f"{key} = {told(key)!r} (accepted is False with latent attention)"
    if not told("num_experts"):
        yield "num_experts = None (accepted is a number with latent attention)"
        return
    dense = _dense_layers(told("moe_layer_freq"), arguments["num_layers"])
    if dense is None:
        yield (
            f"moe_layer_freq = {told('moe_layer_freq')!r} (accepted is 0 for the first layers and "
            "1 for all others)"
        )
    shared, wide = told("moe_shared_expert_intermediate_size") or 0, _expert_width(arguments)
    if not shared or shared % wide:
        yield (
            f"moe_shared_expert_intermediate_size = {shared} (accepted is a multiple of "
            f"moe_ffn_hidden_size, {wide})"
        )
    groups, chosen = told("moe_router_num_groups"), told("moe_router_group_topk")
    if groups and chosen and (told("moe_router_topk") or 2) // chosen != _GROUPED:
        yield (
            f"moe_router_group_topk = {chosen} (accepted is half of moe_router_topk: transformers "
            "chooses groups by their two best experts)"
        )


def _dense_layers(frequency: Any, layers: int) -> int | None:
    """The number of first layers without experts; None if it is not the first ones that are."""
    if frequency in (None, 1, "1"):
        return 0
    if not isinstance(frequency, list | tuple) or len(frequency) != layers:
        return None
    count = list(frequency).count(0)
    return count if list(frequency) == [0] * count + [1] * (layers - count) else None


def _expert_width(arguments: Mapping[str, Any]) -> int:
    return arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"]


def describe_latent(
    arguments: Mapping[str, Any], rows: int, names: Collection[str]
) -> dict[str, Any]:
    """The config.json of arguments in which `odd_latent_arguments` finds nothing."""
    told = arguments.get
    wide, heads = _expert_width(arguments), arguments["num_attention_heads"]
    turning, plain = told("qk_pos_emb_head_dim") or 64, told("qk_head_dim") or 128
    groups = told("moe_router_num_groups") if told("moe_router_group_topk") else None
    scaled = told("rope_type") != "rope"
    rope = {**arguments, "position_embedding_type": "yarn" if scaled else "rope"}
    if scaled:
        rope |= {f"yarn_{key}": told(key) or value for key, value in _YARN.items()}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": arguments["hidden_size"],
        "intermediate_size": arguments["ffn_hidden_size"],
        "moe_intermediate_size": wide,
        "num_hidden_layers": arguments["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": told("q_lora_rank"),
        "kv_lora_rank": told("kv_lora_rank") or 32,
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": turning,
        "qk_head_dim": plain + turning,
        "v_head_dim": told("v_head_dim") or 128,
        "head_dim": turning,
        "n_routed_experts": arguments["num_experts"],
        "n_shared_experts": arguments["moe_shared_expert_intermediate_size"] // wide,
        "num_experts_per_tok": told("moe_router_topk") or 2,
        "n_group": groups or 1,
        "topk_group": told("moe_router_group_topk") if groups else 1,
        "routed_scaling_factor": told("moe_router_topk_scaling_factor") or 1.0,
        "norm_topk_prob": (told("moe_router_topk") or 2) > 1,
        "first_k_dense_replace": _dense_layers(told("moe_layer_freq"), arguments["num_layers"]),
        "num_nextn_predict_layers": told("mtp_num_layers") or 0,
        "vocab_size": rows,
        "max_position_embeddings": told("max_position_embeddings") or 2048,
        "rms_norm_eps": arguments["norm_epsilon"],
        "rope_parameters": _with_scale(rope_of(rope), arguments),
        "rope_interleave": True,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "hidden_act": "silu",
        "attention_bias": False,
        "router_aux_loss_coef": told("moe_aux_loss_coeff") or 0.0,
        "dtype": "float32",
    }


def _with_scale(rope: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's settings, with that of the scale of scores, which holds without `mscale` too."""
    scale = arguments.get("mscale_all_dim")
    if "attention_factor" in rope and scale:
        return {**rope, "mscale_all_dim": float(scale)}
    return rope


def latent_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for a config.json in which every key stands."""
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"] or 0
    rope = rope_arguments(config["rope_parameters"])
    found = {key: value for key, value in rope.items() if not key.startswith("yarn_")}
    wide, heads = config["moe_intermediate_size"], config["num_attention_heads"]
    limited = (config["n_group"] or 1) > (config["topk_group"] or 1)
    dense = min(dense, layers)
    return {
        **found,
        "position_embedding_type": "rope",
        "rope_type": "yarn" if rope["position_embedding_type"] == "yarn" else "rope",
        "rotary_scaling_factor": rope.get("rotary_scaling_factor", 1.0),
        "num_layers": layers,
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": False,
        "num_query_groups": heads,
        "kv_channels": config["v_head_dim"],
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "qk_layernorm": True,
        "max_position_embeddings": config["max_position_embeddings"],
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "attention_dropout": config.get("attention_dropout") or 0.0,
        "hidden_dropout": 0.0,
        "num_experts": config["n_routed_experts"],
        "moe_layer_freq": [0] * dense + [1] * (layers - dense),
        "moe_ffn_hidden_size": wide,
        "moe_shared_expert_intermediate_size": wide * config["n_shared_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_num_groups": config["n_group"] if limited else None,
        "moe_router_group_topk": config["topk_group"] if limited else None,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_load_balancing_type": "seq_aux_loss" if config.get("seq_aux") else "aux_loss",
        "moe_aux_loss_coeff": config.get("router_aux_loss_coef") or 0.0,
        "mtp_num_layers": None,  # the weights tell
    }


def odd_latent_settings(told: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a config.json, each with its value, that Megatron has no words for."""
    rope = told["rope_parameters"]
    yield from odd_rope(rope)
    if rope["rope_type"] == "llama3":
        yield "rope_type llama3 with latent attention (accepted are default and yarn)"
    if rope["rope_type"] == "yarn":
        for key, value in _YARN.items():
            if rope.get(key) not in (value, None):
                yield f"{key} of yarn = {json.dumps(rope[key])} (accepted is {value})"
        if rope.get("truncate") is False:
            yield "truncate of yarn = false (accepted is true)"
        if rope.get("mscale_all_dim") and not rope.get("mscale"):
            yield "mscale_all_dim of yarn without mscale (Megatron takes 1 for it)"
    if told["rms_norm_eps"] != _NEEDED["norm_epsilon"]:
        yield (
            f"rms_norm_eps = {told['rms_norm_eps']} (accepted is {_NEEDED['norm_epsilon']}, which "
            "transformers has in norms of latent vectors; Megatron has one for all norms)"
        )
    heads, groups = told["num_attention_heads"], told["num_key_value_heads"]
    if groups not in (heads, None):
        yield f"num_key_value_heads = {groups} (accepted is num_attention_heads, {heads})"
    each, chosen = told["num_experts_per_tok"], told["topk_group"] or 1
    if bool(told["norm_topk_prob"]) != (each > 1):
        yield (
            f"norm_topk_prob = {json.dumps(told['norm_topk_prob'])} (accepted is "
            f"{json.dumps(each > 1)} with {each} experts a token)"
        )
    if (told["n_group"] or 1) > chosen and each // chosen != _GROUPED:
        yield (
            f"topk_group = {chosen} (accepted is half of num_experts_per_tok, {each}: Megatron "
            "chooses groups by their best num_experts_per_tok / topk_group experts)"
        )
    if not told["n_shared_experts"]:
        yield f"n_shared_experts = {json.dumps(told['n_shared_experts'])} (accepted is 1 or more)"
