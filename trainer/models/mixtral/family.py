"""Mixtral as one value: Mistral with experts in the place of MLPs. Needs no torch."""

from __future__ import annotations

from holdfast.trainer.models.decoder import (
    Described,
    Design,
    ExpertConfig,
    ExpertDesign,
    RouterDesign,
    decoder_family,
    window_from_json,
    window_to_json,
)


class MixtralConfig(ExpertConfig, frozen=True, kw_only=True):
    """The `[model]` section of Mixtral; `intermediate` is the width of each expert."""

    sliding_window: int = 0
    """The keys that a query sees, itself included; 0: all before it."""


def _design(model: MixtralConfig) -> Design:
    experts = ExpertDesign(
        count=model.experts,
        per_token=model.experts_per_token,
        intermediate=model.intermediate,
        router=RouterDesign(
            aux_loss=model.router_aux_loss_coef,
            z_loss=model.router_z_loss_coef,
            weight="block_sparse_moe.gate.weight",
        ),
        matrices=(
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
            "block_sparse_moe.experts.{}.w2.weight",
        ),
    )
    return Design(experts=experts, windows=(model.sliding_window,) * model.layers)


FAMILY = decoder_family(
    MixtralConfig,
    _design,
    Described(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        keys={
            "num_local_experts": "experts",
            "num_experts_per_tok": "experts_per_token",
            "router_aux_loss_coef": "router_aux_loss_coef",
        },
        to_json=window_to_json,
        from_json=window_from_json,
        honoured=frozenset({"sliding_window"}),
    ),
)
