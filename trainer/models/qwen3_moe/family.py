"""Qwen3 with experts as one value. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.trainer.models.decoder import (
    Described,
    Design,
    ExpertConfig,
    ExpertDesign,
    RouterDesign,
    decoder_family,
)


class Qwen3MoeConfig(ExpertConfig, frozen=True, kw_only=True):
    """The `[model]` section of Qwen3 with experts."""

    expert_intermediate: int = 768
    """The width of each expert."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts have the sum 1."""
    attention_bias: bool = False
    """Biases of attention's four projections."""
    sliding_window: int = 0
    """The keys that a query sees, itself included; 0: all before it."""
    dense_layers: tuple[int, ...] = ()
    """The layers, counted from 0, that have a plain MLP in the place of experts."""


def _design(model: Qwen3MoeConfig) -> Design:
    experts = ExpertDesign(
        count=model.experts,
        per_token=model.experts_per_token,
        intermediate=model.expert_intermediate,
        router=RouterDesign(
            aux_loss=model.router_aux_loss_coef,
            z_loss=model.router_z_loss_coef,
            normalizes=model.norm_topk_prob,
        ),
        dense_layers=model.dense_layers,
    )
    bias = model.attention_bias
    return Design(
        qkv_bias=bias,
        output_bias=bias,
        head_norms=True,
        experts=experts,
        windows=(model.sliding_window,) * model.layers,
    )


def _to_json(model: Qwen3MoeConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": model.sliding_window > 0,
        "sliding_window": model.sliding_window or None,
        "mlp_only_layers": list(model.dense_layers),
    }


def _from_json(told: Mapping[str, Any]) -> dict[str, Any]:
    is_used = told.get("use_sliding_window")
    step, layers = told.get("decoder_sparse_step") or 1, told.get("num_hidden_layers") or 0
    plain = {layer for layer in range(layers) if (layer + 1) % step}
    return {
        "sliding_window": (told.get("sliding_window", 4096) or 0) if is_used else 0,
        "dense_layers": tuple(sorted(plain.union(told.get("mlp_only_layers") or ()))),
    }


FAMILY = decoder_family(
    Qwen3MoeConfig,
    _design,
    Described(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        keys={
            "attention_bias": "attention_bias",
            "num_experts": "experts",
            "num_experts_per_tok": "experts_per_token",
            "moe_intermediate_size": "expert_intermediate",
            "norm_topk_prob": "norm_topk_prob",
            "router_aux_loss_coef": "router_aux_loss_coef",
        },
        fixed={"decoder_sparse_step": 1},
        to_json=_to_json,
        from_json=_from_json,
        aliases={"num_experts": "num_local_experts"},
        honoured=frozenset(
            {"use_sliding_window", "sliding_window", "decoder_sparse_step", "mlp_only_layers"}
        ),
    ),
)
