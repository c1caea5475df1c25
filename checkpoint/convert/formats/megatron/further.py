"""The layers that predict further tokens, which Megatron numbers by themselves. Pure.

In rules they are layers behind those of the decoder, as in Hugging Face's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from holdfast.checkpoint.convert.rules import Joined

_FURTHER: Final = re.compile(
    r"(^|.*\.)mtp\.layers\.(\d+)\.(?:(?:transformer|mtp_model)_layer\.)?(.*)"
)
_LAYER: Final = re.compile(r"(^|.*\.)decoder\.layers\.(\d+)\.(.*)")
_MODEL_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")
_OWN: Final = ("enorm.", "hnorm.", "eh_proj.", "final_layernorm.")
"""The modules that such a layer has around a layer of the decoder."""


def from_further(name: str, arguments: Mapping[str, Any]) -> str:
    """The name of a tensor in rules, with or without the prefix of a state."""
    found = _FURTHER.fullmatch(name)
    layers = arguments.get("num_layers")
    if found is None or not isinstance(layers, int):
        return name
    return f"{found[1]}decoder.layers.{layers + int(found[2])}.{found[3]}"


def to_further(name: str, arguments: Mapping[str, Any]) -> str:
    """Megatron's name of a tensor, from its name in rules."""
    found = _LAYER.fullmatch(name)
    layers = arguments.get("num_layers")
    if found is None or not isinstance(layers, int) or int(found[2]) < layers:
        return name
    module = found[3] if found[3].startswith(_OWN) else f"transformer_layer.{found[3]}"
    return f"{found[1]}mtp.layers.{int(found[2]) - layers}.{module}"


def with_further(joined: Sequence[Joined], arguments: Mapping[str, Any]) -> list[Joined]:
    """The tensors to write under Megatron's names."""
    return [
        replace(
            one,
            tensor=replace(one.tensor, name=to_further(one.tensor.name, arguments)),
            weight=to_further(one.weight, arguments),
        )
        for one in joined
    ]


def further_count(names: Iterable[str], arguments: Mapping[str, Any]) -> int:
    """The number of such layers among the weights of a model, by Hugging Face's names."""
    layers = arguments.get("num_layers")
    if not isinstance(layers, int):
        return 0
    found = (_MODEL_LAYER.match(name) for name in names)
    return len({int(layer[1]) for layer in found if layer is not None and int(layer[1]) >= layers})
