"""Qwen3 as one value: norms of queries and keys, biases if wanted, windows. Needs no torch."""

from __future__ import annotations

from holdfast.trainer.models.decoder import (
    WINDOW_KEYS,
    Described,
    Design,
    LayeredWindowConfig,
    decoder_family,
    windows_from_json,
    windows_to_json,
)


class Qwen3Config(LayeredWindowConfig, frozen=True, kw_only=True):
    """The `[model]` section of Qwen3."""

    attention_bias: bool = False
    """Biases of attention's four projections."""


def _design(model: Qwen3Config) -> Design:
    bias = model.attention_bias
    return Design(qkv_bias=bias, output_bias=bias, head_norms=True, windows=model.windows)


FAMILY = decoder_family(
    Qwen3Config,
    _design,
    Described(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        keys={"attention_bias": "attention_bias"},
        to_json=windows_to_json,
        from_json=windows_from_json,
        honoured=WINDOW_KEYS,
    ),
)
