"""Llama as one value: the plain decoder, with biases if they are wanted. Needs no torch."""

from __future__ import annotations

from holdfast.trainer.models.decoder import DecoderConfig, Described, Design, decoder_family


class LlamaConfig(DecoderConfig, frozen=True, kw_only=True):
    """The `[model]` section of Llama."""

    attention_bias: bool = False
    """Biases of attention's four projections."""
    mlp_bias: bool = False
    """Biases of the MLP's three projections."""


def _design(model: LlamaConfig) -> Design:
    return Design(
        qkv_bias=model.attention_bias, output_bias=model.attention_bias, mlp_bias=model.mlp_bias
    )


FAMILY = decoder_family(
    LlamaConfig,
    _design,
    Described(
        model_type="llama",
        architecture="LlamaForCausalLM",
        keys={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        fixed={"pretraining_tp": 1},
    ),
)
