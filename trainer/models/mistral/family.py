"""Mistral as one value: a plain decoder with a sliding window. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.trainer.models.decoder import Described, Design, WindowedConfig, decoder_family


class MistralConfig(WindowedConfig, frozen=True, kw_only=True):
    """The `[model]` section of Mistral."""


def _design(model: MistralConfig) -> Design:
    return Design(windows=(model.sliding_window,) * model.layers)


def _to_json(model: MistralConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window or None}


def _from_json(told: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": told.get("sliding_window") or 0}


FAMILY = decoder_family(
    MistralConfig,
    _design,
    Described(
        model_type="mistral",
        architecture="MistralForCausalLM",
        to_json=_to_json,
        from_json=_from_json,
        honoured=frozenset({"sliding_window"}),
    ),
)
