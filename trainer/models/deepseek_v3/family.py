"""DeepSeek-V3 as one value: latent attention, and experts beside a shared one. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.trainer.models.decoder import (
    Described,
    Design,
    ExpertConfig,
    ExpertDesign,
    LatentDesign,
    MultiTokenDesign,
    RouterDesign,
    decoder_family,
)


class DeepseekV3Config(ExpertConfig, frozen=True, kw_only=True):
    """The `[model]` section of DeepSeek-V3. A field for each key.

    `head_dim` is that of a query and key in all.
    """

    expert_intermediate: int = 768
    """The width of each expert."""
    shared_experts: int = 1
    """The experts that every token goes to beside its own: one MLP of as many times the width."""
    dense_layers: tuple[int, ...] = ()
    """The layers, counted from 0, that have a plain MLP in the place of experts: the first ones."""
    expert_groups: int = 1
    """Experts lie in so many groups of equal size."""
    groups_per_token: int = 1
    """The groups that a token's experts may lie in."""
    router_scale: float = 2.5
    """The factor of the weights of a token's experts."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts have the sum 1, before that factor."""
    router_bias_speed: float = 0.001
    """What a step changes the bias of each expert by, which evens the loads."""
    query_rank: int = 1536
    """The width of the latent vector of queries; 0: they are made of the hidden state."""
    key_value_rank: int = 512
    """The width of the latent vector of keys and values."""
    plain_head_dim: int = 128
    """The elements of a query and key that do not turn with the position."""
    rope_head_dim: int = 64
    """Those that do."""
    value_head_dim: int = 128
    multi_token_layers: int = 0
    """The layers behind the others that predict a further token each, in training: 0 or 1."""
    multi_token_loss_coef: float = 0.3
    """The factor of the loss of what they predict."""

    def __post_init__(self) -> None:
        kv_heads, dim = self.kv_heads, self.plain_head_dim + self.rope_head_dim
        msgspec.structs.force_setattr(self, "head_dim", self.head_dim or dim)
        super().__post_init__()
        msgspec.structs.force_setattr(self, "kv_heads", kv_heads or self.heads)


def _design(model: DeepseekV3Config) -> Design:
    return Design(
        latent=LatentDesign(
            query_rank=model.query_rank,
            rank=model.key_value_rank,
            plain=model.plain_head_dim,
            turning=model.rope_head_dim,
            value=model.value_head_dim,
        ),
        experts=ExpertDesign(
            count=model.experts,
            per_token=model.experts_per_token,
            intermediate=model.expert_intermediate,
            router=RouterDesign(
                aux_loss=model.router_aux_loss_coef,
                z_loss=model.router_z_loss_coef,
                normalizes=model.norm_topk_prob,
                score="sigmoid",
                scale=model.router_scale,
                groups=model.expert_groups,
                group_limit=model.groups_per_token * (model.expert_groups > 1),
                bias_speed=model.router_bias_speed,
            ),
            shared=model.shared_experts * model.expert_intermediate,
            dense_layers=model.dense_layers,
            only_first_dense=True,
        ),
        multi_token=MultiTokenDesign(model.multi_token_layers, model.multi_token_loss_coef)
        if model.multi_token_layers
        else None,
    )


def _to_json(model: DeepseekV3Config) -> dict[str, Any]:
    return {
        "head_dim": model.rope_head_dim,
        "q_lora_rank": model.query_rank or None,
        "first_k_dense_replace": len(model.dense_layers),
    }


def _from_json(told: Mapping[str, Any]) -> dict[str, Any]:
    below, layers = told.get("first_k_dense_replace") or 0, told.get("num_hidden_layers") or 0
    plain, turning = told.get("qk_nope_head_dim"), told.get("qk_rope_head_dim")
    return {
        "head_dim": None if plain is None or turning is None else plain + turning,
        "query_rank": told.get("q_lora_rank") or 0,
        "dense_layers": tuple(range(min(below, layers))),
    }


FAMILY = decoder_family(
    DeepseekV3Config,
    _design,
    Described(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        keys={
            "n_routed_experts": "experts",
            "num_experts_per_tok": "experts_per_token",
            "moe_intermediate_size": "expert_intermediate",
            "n_shared_experts": "shared_experts",
            "n_group": "expert_groups",
            "topk_group": "groups_per_token",
            "routed_scaling_factor": "router_scale",
            "norm_topk_prob": "norm_topk_prob",
            "kv_lora_rank": "key_value_rank",
            "qk_nope_head_dim": "plain_head_dim",
            "qk_rope_head_dim": "rope_head_dim",
            "v_head_dim": "value_head_dim",
            "num_nextn_predict_layers": "multi_token_layers",
        },
        fixed={"rope_interleave": True, "attention_bias": False},
        to_json=_to_json,
        from_json=_from_json,
        aliases={"n_routed_experts": "num_local_experts"},
        honoured=frozenset({"q_lora_rank", "first_k_dense_replace", "head_dim"}),
    ),
)
