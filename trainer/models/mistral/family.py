"""Mistral as one value: a plain decoder with a sliding window. Needs no torch."""

from __future__ import annotations

from holdfast.trainer.models.decoder import (
    Described,
    Design,
    WindowedConfig,
    decoder_family,
    window_from_json,
    window_to_json,
)


class MistralConfig(WindowedConfig, frozen=True, kw_only=True):
    """The `[model]` section of Mistral."""


def _design(model: MistralConfig) -> Design:
    return Design(windows=(model.sliding_window,) * model.layers)


FAMILY = decoder_family(
    MistralConfig,
    _design,
    Described(
        model_type="mistral",
        architecture="MistralForCausalLM",
        to_json=window_to_json,
        from_json=window_from_json,
        honoured=frozenset({"sliding_window"}),
    ),
)
