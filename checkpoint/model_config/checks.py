"""The reading of a config.json: missing keys filled in, keys that are not honoured named. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from holdfast.checkpoint.model_config.keys import MODEL_TYPES, NEUTRAL, PLAIN, ROPE_KEYS, ModelKeys
from holdfast.parallel.reading import parse_json

_FULL_ATTENTION = "full_attention"


def read_config(content: bytes) -> dict[str, Any]:
    """The keys in the content of a config.json.

    Raises:
        ValueError: it is not a JSON object.
    """
    found = parse_json(content)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def explicit(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in which every honoured key stands, as transformers understands the file.

    `rope_parameters` has the whole of rotary embedding. A model type that is not among
    `MODEL_TYPES` stays as it is.
    """
    keys = MODEL_TYPES.get(str(config.get("model_type")))
    if keys is None:
        return dict(config)
    given = {keys.aliases.get(key, key): value for key, value in config.items()}
    found = {**keys.honoured, **given}
    if keys.rope_theta:
        found["rope_parameters"] = rope_of(config, keys)
    return found


def rope_of(config: Mapping[str, Any], keys: ModelKeys) -> dict[str, Any]:
    """The settings of rotary embedding, from wherever config.json keeps them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    rope = dict(rope) if isinstance(rope, Mapping) else {}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope.get("rope_theta") is None:
        told = config.get("rope_theta")
        rope["rope_theta"] = keys.rope_theta if told is None else told
    if rope["rope_type"] == "llama3":
        positions = config.get(
            "original_max_position_embeddings",
            config.get("max_position_embeddings", keys.honoured.get("max_position_embeddings")),
        )
        rope.setdefault("original_max_position_embeddings", positions)
    return rope


def unhonoured(
    config: Mapping[str, Any], honoured: Collection[str] = ()
) -> Iterator[tuple[str, Any, str]]:
    """The keys of a config.json that change the function and are not honoured.

    The kind of rotary embedding is not among them; its other settings are.

    Args:
        honoured: the keys that the caller honours beside those of the model type.
    Returns:
        (key, its value, what would be accepted), in the order of the file.
    """
    kind = config.get("model_type")
    keys = MODEL_TYPES.get(str(kind))
    if keys is None:
        yield "model_type", kind, f"one of {', '.join(MODEL_TYPES)}"
        return
    fixed = {**PLAIN, **keys.fixed}
    known = NEUTRAL | keys.neutral | keys.honoured.keys() | keys.aliases.keys()
    for key, value in config.items():
        if key in honoured:
            continue
        if key in fixed:
            if not any(_same(value, accepted) for accepted in fixed[key]):
                yield key, value, f"only {_shown(fixed[key][0])}"
        elif key in ("rope_parameters", "rope_scaling"):
            yield from _rope_problems(key, value)
        elif key == "layer_types":
            if any(kind != _FULL_ATTENTION for kind in value or ()):
                yield key, value, f"only {_FULL_ATTENTION} for every layer"
        elif key not in known and key not in _ROPE and key[:1] != "_" and not _is_empty(value):
            yield key, value, "a key that is not known; remove it if the model does not use it"


_ROPE = ("rope_theta", "original_max_position_embeddings")


def _rope_problems(key: str, value: Any) -> Iterator[tuple[str, Any, str]]:
    if not value:
        return
    if not isinstance(value, Mapping):
        yield key, value, "a table of settings"
        return
    for name, setting in value.items():
        if name == "partial_rotary_factor" and value.get("rope_type") != "proportional":
            if setting not in (None, 1, 1.0):
                yield f"{key}.{name}", setting, "only 1.0"
        elif name not in ROPE_KEYS and not _is_empty(setting):
            yield f"{key}.{name}", setting, f"settings are {', '.join(sorted(ROPE_KEYS))}"


def _same(value: Any, accepted: Any) -> bool:
    if accepted is False:
        return _is_empty(value)
    return value == accepted and isinstance(value, bool) == isinstance(accepted, bool)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _shown(value: Any) -> str:
    return json.dumps(value)
