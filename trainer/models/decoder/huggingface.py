"""A decoder as Hugging Face's `config.json`, and the reverse: one table of keys for both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from holdfast.checkpoint.model_config import explicit, unhonoured
from holdfast.parallel.reading import converted
from holdfast.trainer.models.decoder.section import (
    DecoderConfig,
    LayeredWindowConfig,
    RopeScaling,
)

_SHARED: Final[Mapping[str, str]] = {
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""By the key of config.json, that of [model] with the same value."""
_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "proportional": ("factor", "partial_rotary_factor"),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""By the type of rotary embedding, its settings."""
_UNSET: Final = frozenset({"attention_factor", "mscale", "mscale_all_dim"})
"""The settings that are not written where they are 0, which stands for none."""
_KINDS: Final = ("full_attention", "sliding_attention")
"""The names of a layer without and with a window."""
_NO_FUNCTION: Final = frozenset({"max_seq_len", "dropout", "init_std", "multi_token_layers"})
"""The keys of [model] that do not change the function of a trained model."""


@dataclass(frozen=True, slots=True)
class Described:
    """The form of a family's `config.json`."""

    model_type: str
    architecture: str
    """The class in transformers."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """The keys of the family alone: by the one of config.json, that of [model]."""
    sizes: Mapping[str, str] = field(default_factory=lambda: _SHARED)
    """The keys of sizes: by the one of config.json, that of [model]."""
    rotates: bool = True
    """Whether the file has Llama's keys of rotary embedding, activation and dropout."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What is written for every model of the family."""
    to_json: Callable[[Any], Mapping[str, Any]] = lambda model: {}
    """(section) -> the keys of config.json with other values than those of [model]."""
    from_json: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda told: {}
    """The reverse, from a config.json in which every key stands."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """The other name by which transformers knows a key."""
    honoured: frozenset[str] = frozenset()
    """The keys of config.json that `from_json` reads."""

    def config_json(self, model: DecoderConfig, seq_len: int, dtype: str) -> dict[str, Any]:
        """The `config.json` of a model. Pure.

        Args:
            seq_len: the length of its training sequences, in tokens.
            dtype: the dtype of its weights, by torch's name.
        """
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{theirs: getattr(model, ours) for theirs, ours in self._pairs()},
            **(_rotary_to_json(model, seq_len) if self.rotates else {}),
            "initializer_range": model.init_std,
            **self.fixed,
            **self.to_json(model),
            "dtype": dtype,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "use_cache": True,
        }

    def _pairs(self) -> list[tuple[str, str]]:
        """The keys of config.json and of [model] that have the same value."""
        return [*self.sizes.items(), *self.keys.items()]

    def section(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of [model] that a `config.json` of this family gives. Pure.

        A missing key has the value that transformers takes for it.

        Raises:
            ValueError: its settings of rotary embedding are not those of transformers.
        """
        told = explicit(described)
        for key in self.keys.keys() - told.keys():
            told[key] = told.get(self.aliases.get(key, ""))
        found = {ours: told.get(theirs) for theirs, ours in self._pairs()}
        found["init_std"] = told.get("initializer_range")
        if self.rotates:
            found |= _rotary_from_json(told, found)
        return found | dict(self.from_json(told))

    def differences(
        self, model: DecoderConfig, described: Mapping[str, Any]
    ) -> Iterator[tuple[str, str]]:
        """The differences between a `config.json` and a model: key and line of each. Pure.

        A key that changes the function and has no counterpart in [model] is a difference by its
        name.
        """
        if (kind := described.get("model_type")) != model.family:
            yield "model.family", f"model.family = {model.family!r} (its config.json has {kind!r})"
        try:
            theirs = self.section(described)
        except ValueError as error:
            yield "config.json:rope_parameters", f"its config.json has rotary settings: {error}"
            return
        free = _NO_FUNCTION if self.rotates else _NO_FUNCTION - {"max_seq_len"}
        for key, value in theirs.items():
            mine = model.dim_per_head if key == "head_dim" else getattr(model, key)
            if key not in free and value != mine:
                line = f"model.{key} = {_shown(mine)} (its config.json has {_shown(value)})"
                yield f"model.{key}", line
        if kind == model.family:
            for key, value, accepted in unhonoured(described, self.honoured | self.keys.keys()):
                line = f"its config.json has {key} = {json.dumps(value)} ({accepted})"
                yield f"config.json:{key}", line


def _rotary_to_json(model: DecoderConfig, seq_len: int) -> dict[str, Any]:
    return {
        "head_dim": model.dim_per_head,
        "max_position_embeddings": max(model.max_seq_len, seq_len),
        "rope_theta": model.rope_theta,
        "rope_parameters": {
            "rope_theta": model.rope_theta,
            **_rotary_settings(model.rope_scaling),
        },
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }


def _rotary_from_json(told: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse; `found` has the sizes."""
    heads, hidden = found["heads"], found["hidden"]
    rope = dict(told.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    rope.pop("type", None)
    if rope.get("rope_type") in (None, "default"):
        rope = {}
    given = {key: value for key, value in rope.items() if value is not None}
    return {
        "max_seq_len": told.get("max_position_embeddings"),
        "kv_heads": found["kv_heads"] or heads,
        "head_dim": found["head_dim"] or (hidden // heads if hidden and heads else None),
        "rope_theta": theta,
        "rope_scaling": _scaling(given),
    }


WINDOW_KEYS: Final = frozenset(
    {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
)
"""The keys of config.json for windows of the upper layers."""


class Windowed(Protocol):
    """A section of a model with a window of all layers."""

    @property
    def sliding_window(self) -> int: ...


def window_to_json(model: Windowed) -> dict[str, Any]:
    """The key of a window of all layers. Pure."""
    return {"sliding_window": model.sliding_window or None}


def window_from_json(told: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse. Pure."""
    return {"sliding_window": told.get("sliding_window") or 0}


def windows_to_json(model: LayeredWindowConfig) -> dict[str, Any]:
    """The keys of `WINDOW_KEYS`. Pure."""
    return {
        "use_sliding_window": model.sliding_window > 0,
        "sliding_window": model.sliding_window or None,
        "max_window_layers": model.max_window_layers,
        "layer_types": [_KINDS[window > 0] for window in model.windows],
    }


def windows_from_json(told: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse. Pure.

    Raises:
        ValueError: layers with a window lie below layers without.
    """
    window = told.get("sliding_window", 4096) if told.get("use_sliding_window") else None
    layers = told.get("num_hidden_layers") or 0
    below = told.get("max_window_layers", 28) or 0
    if (kinds := told.get("layer_types")) is not None:
        below = sum(kind == _KINDS[False] for kind in kinds)
        if list(kinds) != [_KINDS[place >= below] for place in range(layers)]:
            raise ValueError(
                f"layer_types = {json.dumps(kinds)}: accepted are {_KINDS[False]} for the lower "
                f"layers and {_KINDS[True]} for the upper ones, one for each layer"
            )
    if not window or below >= layers:
        return {"sliding_window": 0, "max_window_layers": 0}
    return {"sliding_window": window, "max_window_layers": below}


def _rotary_settings(scaling: RopeScaling) -> dict[str, Any]:
    kind = scaling.rope_type
    values = {name: getattr(scaling, name) for name in _SETTINGS[kind]}
    return {"rope_type": kind} | {k: v for k, v in values.items() if v or k not in _UNSET}


def _scaling(settings: Mapping[str, Any]) -> RopeScaling:
    try:
        return converted(settings, RopeScaling)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _shown(value: Any) -> str:
    return repr(msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value)
