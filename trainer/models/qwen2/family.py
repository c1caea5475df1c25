"""Qwen2 as one value: biases of queries, keys and values, and windows. Needs no torch."""

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


class Qwen2Config(LayeredWindowConfig, frozen=True, kw_only=True):
    """The `[model]` section of Qwen2."""


def _design(model: Qwen2Config) -> Design:
    return Design(qkv_bias=True, windows=model.windows)


FAMILY = decoder_family(
    Qwen2Config,
    _design,
    Described(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        to_json=windows_to_json,
        from_json=windows_from_json,
        honoured=WINDOW_KEYS,
    ),
)
