"""The settings of a model that the other side cannot express, by name. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from holdfast.checkpoint.convert.formats.megatron.deepseek import (
    HONOURED,
    odd_latent_arguments,
    odd_latent_settings,
)
from holdfast.checkpoint.convert.formats.megatron.models import (
    FAMILIES,
    NEEDED,
    TANH_GELU,
    family_of,
)
from holdfast.checkpoint.convert.formats.megatron.rope import is_window, odd_rope
from holdfast.checkpoint.model_config import MODEL_TYPES, explicit, unhonoured

FIXED_ARGUMENTS: Final[Mapping[str, tuple[Any, ...]]] = {
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_attention_ratio": (0.0,),
    "hybrid_mlp_ratio": (0.0,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "linear_attention_freq": (None,),
    "linear_attention_type": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_layer_freq": (1, "1"),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_group_topk": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_gate": (False,),
    "moe_shared_expert_intermediate_size": (None, 0),
    "mrope_section": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "rotary_scaling_factor": (1.0,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "window_attn_skip_freq": (None,),
    "window_size": (None, (-1, -1), [-1, -1]),
}
"""Megatron's arguments that change the function, and the values that transformers' models have;
the first is Megatron's own, which a missing argument has."""
_CHOSEN = (
    "swiglu",
    "normalization",
    "position_embedding_type",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "num_experts",
)
"""The arguments that tell the model types apart."""


def odd_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments of a model that no config.json expresses, one line each.

    There are none where the arguments do not describe a model.
    """
    if any(not arguments.get(key) for key in NEEDED):
        return []
    family = family_of(arguments)
    honoured = set(_honoured(arguments, family))
    found = [
        f"{key} = {arguments[key]!r} (accepted is {accepted[0]!r})"
        for key, accepted in FIXED_ARGUMENTS.items()
        if arguments.get(key) is not None
        and key not in honoured
        and not _among(arguments[key], accepted)
    ]
    if arguments.get("multi_latent_attention") is True:
        return [*found, *odd_latent_arguments(arguments)]
    if not family and not found:
        shown = ", ".join(f"{key} = {arguments.get(key)!r}" for key in _CHOSEN)
        found.append(f"together, {shown}")
    if family == "mixtral" and arguments.get("moe_router_pre_softmax"):
        found.append("moe_router_pre_softmax = True (accepted is False, without qk_layernorm)")
    return found


def _honoured(arguments: Mapping[str, Any], family: str) -> Iterator[str]:
    """The arguments in FIXED_ARGUMENTS that a model of this type may have with other values."""
    if arguments.get("multi_latent_attention") is True:
        yield from HONOURED
    if arguments.get("position_embedding_type") == "yarn":
        yield "rotary_scaling_factor"
    if family in ("llama", "mistral") and is_window(arguments.get("window_size")):
        yield "window_size"


def _among(value: Any, accepted: tuple[Any, ...]) -> bool:
    if False in accepted and not isinstance(value, int | float):
        return False
    return any(value == one for one in accepted)


def odd_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a config.json that Megatron's arguments cannot express, one line each."""
    if not config:
        return
    for key, value, accepted in unhonoured(config):
        yield f"{key} = {json.dumps(value)} (accepted is {accepted})"
    kind = config.get("model_type")
    if kind in MODEL_TYPES and kind not in FAMILIES:
        yield f"model_type = {json.dumps(kind)} (accepted are {', '.join(FAMILIES)})"
    told = explicit(config)
    activation = told.get("activation_function", "gelu")
    if activation not in ("gelu", *TANH_GELU):
        allowed = ", ".join(("gelu", *TANH_GELU))
        yield f"activation_function = {json.dumps(activation)} (accepted are {allowed})"
    if kind == "deepseek_v3":
        yield from odd_latent_settings(told)
        return
    yield from odd_rope(told.get("rope_parameters") or {})
