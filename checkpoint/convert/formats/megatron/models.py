"""Hugging Face's config.json from Megatron's arguments, and the reverse. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from holdfast.checkpoint.convert.formats.megatron.deepseek import (
    describe_latent,
    latent_arguments,
    odd_latent_arguments,
)
from holdfast.checkpoint.convert.formats.megatron.rope import (
    rope_arguments,
    rope_of,
    window_arguments,
    window_of,
)
from holdfast.checkpoint.model_config import explicit

NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
"""The arguments without which a model is not described."""
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""The model types that both sides share, and their classes in transformers."""
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
"""The names of the embedding in these models."""
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def family_of(arguments: Mapping[str, Any]) -> str:
    """The model type that arguments describe; "" if it is none of FAMILIES."""
    told = arguments.get
    if all(told(key) for key in NEEDED) and _is_gpt2(arguments):
        return "gpt2"
    if told("multi_latent_attention"):
        sized = all(told(key) for key in NEEDED)
        return "deepseek_v3" if sized and not any(odd_latent_arguments(arguments)) else ""
    alike = (
        told("swiglu") is True
        and told("normalization") == "RMSNorm"
        and told("position_embedding_type") in ("rope", "yarn")
        and not told("add_bias_linear")
        and not told("moe_shared_expert_intermediate_size")
        and told("rotary_percent") in (None, 1.0)
    )
    if not alike or any(not told(key) for key in NEEDED):
        return ""
    if told("qk_layernorm") and not told("add_qkv_bias"):
        return "qwen3_moe" if told("num_experts") else "qwen3"
    if told("qk_layernorm") or (told("add_qkv_bias") and told("num_experts")):
        return ""
    if told("add_qkv_bias"):
        return "qwen2"
    if told("num_experts"):
        return "mixtral"
    return "llama" if window_of(arguments) is None else "mistral"


def _is_gpt2(arguments: Mapping[str, Any]) -> bool:
    told = arguments.get
    return (
        told("position_embedding_type") == "learned_absolute"
        and told("normalization") == "LayerNorm"
        and told("add_bias_linear") is True
        and not told("swiglu")
        and not told("squared_relu")
        and not told("num_experts")
        and not told("qk_layernorm")
        and told("query_groups") in (None, told("num_attention_heads"))
    )


def describe(
    arguments: Mapping[str, Any], rows: int, names: Collection[str], told_type: str = ""
) -> dict[str, Any] | None:
    """The config.json of a model; None if its architecture is none of FAMILIES.

    Args:
        rows: the rows of the embedding, without padding.
        names: the names of the model's weights.
        told_type: the model type by another file: a Mistral without a window is a Llama too.
    """
    family = family_of(arguments)
    if (family, told_type) == ("llama", "mistral"):
        family = told_type
    if not family:
        return None
    if family == "gpt2":
        return _describe_gpt2(arguments, rows, names)
    if family == "deepseek_v3":
        return describe_latent(arguments, rows, names)
    heads = arguments["num_attention_heads"]
    experts = arguments.get("num_experts")
    wide = arguments["ffn_hidden_size"]
    expert_wide = arguments.get("moe_ffn_hidden_size") or wide
    described: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_size": arguments["hidden_size"],
        "intermediate_size": expert_wide if family == "mixtral" else wide,
        "num_hidden_layers": arguments["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": arguments["query_groups"],
        "head_dim": arguments.get("kv_channels") or arguments["hidden_size"] // heads,
        "vocab_size": rows,
        "max_position_embeddings": arguments.get("max_position_embeddings") or 2048,
        "rms_norm_eps": arguments.get("norm_epsilon") or 1e-5,
        "rope_parameters": rope_of(arguments),
        "rope_theta": float(arguments.get("rotary_base") or 10000),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "hidden_act": "silu",
        "dtype": "float32",
    }
    if family in ("llama", "qwen3", "qwen3_moe"):
        described["attention_bias"] = False
    if family == "llama":
        described["mlp_bias"] = False
    if experts:
        described["num_experts_per_tok"] = arguments.get("moe_router_topk") or 2
        described["router_aux_loss_coef"] = arguments.get("moe_aux_loss_coeff") or 0.0
        described["num_local_experts" if family == "mixtral" else "num_experts"] = experts
    if family in ("mistral", "mixtral"):
        described["sliding_window"] = window_of(arguments)
    if family == "qwen3_moe":
        described["moe_intermediate_size"] = expert_wide
        described["norm_topk_prob"] = not arguments.get("moe_router_pre_softmax")
        described |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return described


def _describe_gpt2(
    arguments: Mapping[str, Any], rows: int, names: Collection[str]
) -> dict[str, Any]:
    return {
        "architectures": [FAMILIES["gpt2"]],
        "model_type": "gpt2",
        "n_embd": arguments["hidden_size"],
        "n_inner": arguments["ffn_hidden_size"],
        "n_layer": arguments["num_layers"],
        "n_head": arguments["num_attention_heads"],
        "vocab_size": rows,
        "n_positions": arguments.get("max_position_embeddings") or 1024,
        "layer_norm_epsilon": arguments.get("norm_epsilon") or 1e-5,
        "activation_function": "gelu_new" if arguments.get("openai_gelu") else "gelu",
        "attn_pdrop": arguments.get("attention_dropout") or 0.0,
        "resid_pdrop": arguments.get("hidden_dropout") or 0.0,
        "embd_pdrop": arguments.get("hidden_dropout") or 0.0,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "dtype": "float32",
    }


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for the model in config.json, as far as that file describes it.

    Raises:
        KeyError: config.json lacks a size.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        return {}
    config = explicit(config)
    if family == "gpt2":
        return _gpt2_arguments(config)
    if family == "deepseek_v3":
        return latent_arguments(config)
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    experts = config.get("num_local_experts")
    wide = config["intermediate_size"]
    found = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": wide,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        **rope_arguments(config["rope_parameters"]),
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family in ("qwen3", "qwen3_moe"),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "attention_dropout": config.get("attention_dropout") or 0.0,
        "hidden_dropout": 0.0,
    }
    if family == "mistral":
        found |= window_arguments(config["sliding_window"])
    if family in ("mixtral", "qwen3_moe") and experts:
        found |= {
            "num_experts": experts,
            "moe_layer_freq": 1,
            "moe_ffn_hidden_size": config.get("moe_intermediate_size") or wide,
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": config.get("router_aux_loss_coef") or 0.0,
            "moe_router_pre_softmax": family == "qwen3_moe" and not config.get("norm_topk_prob"),
        }
    return found


def _gpt2_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = config["n_head"], config["n_embd"]
    return {
        "num_layers": config["n_layer"],
        "hidden_size": hidden,
        "ffn_hidden_size": config.get("n_inner") or 4 * hidden,
        "num_attention_heads": heads,
        "group_query_attention": False,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "max_position_embeddings": config["n_positions"],
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": config["layer_norm_epsilon"],
        "swiglu": False,
        "openai_gelu": config["activation_function"] in TANH_GELU,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "attention_dropout": config.get("attn_pdrop", 0.1),
        "hidden_dropout": config.get("resid_pdrop", 0.1),
    }
