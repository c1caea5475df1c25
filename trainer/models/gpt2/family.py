"""GPT-2 as one value: LayerNorm, learned positions, an MLP of two projections. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from holdfast.trainer.models.decoder import (
    Described,
    Design,
    LearnedPositionsConfig,
    decoder_family,
)
from holdfast.trainer.models.gpt2.names import as_stored

_TANH: Final = frozenset({"gelu_new", "gelu_fast", "gelu_pytorch_tanh"})
"""transformers' names of GELU by a hyperbolic tangent."""


class GPT2Config(LearnedPositionsConfig, frozen=True, kw_only=True):
    """The `[model]` section of GPT-2."""

    activation: Literal["gelu_new", "gelu"] = "gelu_new"
    """The function between the MLP's projections: GELU by a hyperbolic tangent, or exact."""
    max_seq_len: int = 1024
    """The positions that are learned."""
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        unset = {"intermediate": not self.intermediate, "kv_heads": not self.kv_heads}
        super().__post_init__()
        for name, value in (("intermediate", 4 * self.hidden), ("kv_heads", self.heads)):
            if unset[name]:
                msgspec.structs.force_setattr(self, name, value)


def _design(model: GPT2Config) -> Design:
    return Design(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        layer_norm=True,
        learned_positions=True,
        gelu="tanh" if model.activation == "gelu_new" else "none",
        inputs_first=True,
        stored=as_stored,
    )


def _to_json(model: GPT2Config) -> dict[str, Any]:
    return {
        "activation_function": model.activation,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
    }


def _from_json(told: Mapping[str, Any]) -> dict[str, Any]:
    activation, hidden = told.get("activation_function"), told.get("n_embd")
    return {
        "activation": "gelu_new" if activation in _TANH else activation,
        "intermediate": told.get("n_inner") or (4 * hidden if hidden else None),
        "kv_heads": told.get("n_head"),
    }


FAMILY = decoder_family(
    GPT2Config,
    _design,
    Described(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        sizes={
            "n_embd": "hidden",
            "n_inner": "intermediate",
            "n_layer": "layers",
            "n_head": "heads",
            "n_positions": "max_seq_len",
            "vocab_size": "vocab",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        rotates=False,
        fixed={"attn_pdrop": 0.0},
        to_json=_to_json,
        from_json=_from_json,
    ),
)
