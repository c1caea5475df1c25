"""Qwen3 with experts as one value. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.trainer.models.decoder import (
    Described,
    Design,
    ExpertConfig,
    ExpertDesign,
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


def _design(model: Qwen3MoeConfig) -> Design:
    experts = ExpertDesign(
        count=model.experts,
        per_token=model.experts_per_token,
        intermediate=model.expert_intermediate,
        normalizes=model.norm_topk_prob,
        aux_loss=model.router_aux_loss_coef,
        z_loss=model.router_z_loss_coef,
        router="mlp.gate.weight",
        matrices=(
            "mlp.experts.{}.gate_proj.weight",
            "mlp.experts.{}.up_proj.weight",
            "mlp.experts.{}.down_proj.weight",
        ),
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
    }


def _from_json(told: Mapping[str, Any]) -> dict[str, Any]:
    is_used = told.get("use_sliding_window")
    return {"sliding_window": (told.get("sliding_window", 4096) or 0) if is_used else 0}


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
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
        to_json=_to_json,
        from_json=_from_json,
        aliases={"num_experts": "num_local_experts"},
        honoured=frozenset({"use_sliding_window", "sliding_window"}),
    ),
)
