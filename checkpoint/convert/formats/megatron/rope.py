"""Rotary embedding and windows of attention, in config.json's words and in Megatron's. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeGuard

LLAMA3_ROPE: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The settings of Megatron's --use-rope-scaling beside the factor, which its code has."""
_ORIGINAL: Final = 4096
"""Megatron's original length of sequences with YaRN."""
_FAST, _SLOW = 32.0, 1.0
"""The rotations between which YaRN goes over, on both sides."""


def rope_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of config.json, from Megatron's arguments."""
    told = arguments.get
    base = float(told("rotary_base") or 10000)
    if told("position_embedding_type") == "yarn":
        return {"rope_type": "yarn", "rope_theta": base, **_yarn_of(arguments)}
    if not told("use_rope_scaling"):
        return {"rope_type": "default", "rope_theta": base}
    factor = float(told("rope_scaling_factor") or 8.0)
    return {"rope_type": "llama3", "rope_theta": base, "factor": factor, **LLAMA3_ROPE}


def _yarn_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    told = arguments.get
    factor = float(_given(told("rotary_scaling_factor"), 1.0))
    found: dict[str, Any] = {
        "factor": factor,
        "original_max_position_embeddings": told("yarn_original_max_position_embeddings")
        or _ORIGINAL,
        "beta_fast": float(told("yarn_beta_fast") or _FAST),
        "beta_slow": float(told("yarn_beta_slow") or _SLOW),
    }
    if _given(told("yarn_correction_range_round_to_int"), True) is False:
        found["truncate"] = False
    scale = float(_given(told("mscale"), 1.0))
    scale_of_all = float(_given(told("mscale_all_dim"), 0.0))
    if scale and scale_of_all:
        found |= {"mscale": scale, "mscale_all_dim": scale_of_all}
    elif (scale, scale_of_all) != (1.0, 0.0):
        # transformers follows these words only where both are there.
        found["attention_factor"] = _magnitude(factor, scale) / _magnitude(factor, scale_of_all)
    return found


def _magnitude(factor: float, scale: float) -> float:
    """YaRN's factor of cos and sin (Peng et al. 2023, section 3.4), as Megatron computes it."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _given(value: Any, usual: Any) -> Any:
    return usual if value is None else value


def rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for `rope_parameters` in which `odd_rope` finds nothing."""
    kind = rope["rope_type"]
    found = {
        "position_embedding_type": "yarn" if kind == "yarn" else "rope",
        "rotary_base": int(rope["rope_theta"]),
        "rotary_percent": 1.0,
        "use_rope_scaling": kind == "llama3",
    }
    if kind == "llama3":
        found["rope_scaling_factor"] = float(rope["factor"])
    if kind == "yarn":
        both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
        found |= {
            "rotary_scaling_factor": float(rope["factor"]),
            "mscale": float(rope["mscale"]) if both else 1.0,
            "mscale_all_dim": float(rope["mscale_all_dim"]) if both else 0.0,
            "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
            "yarn_beta_fast": float(rope.get("beta_fast") or _FAST),
            "yarn_beta_slow": float(rope.get("beta_slow") or _SLOW),
            "yarn_correction_range_round_to_int": rope.get("truncate", True) is not False,
        }
    return found


def odd_rope(rope: Mapping[str, Any]) -> Iterator[str]:
    """The settings of `rope_parameters` that Megatron's arguments cannot express, a line each."""
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 0)
    if kind not in ("default", "llama3", "yarn"):
        yield f"rope_type = {json.dumps(kind)} (accepted are default, llama3 and yarn)"
    if kind == "llama3":
        for key, value in LLAMA3_ROPE.items():
            if rope.get(key) != value:
                yield (
                    f"{key} of llama3 = {json.dumps(rope.get(key))} (accepted is {value}, which "
                    "Megatron's code has: only the factor is an argument)"
                )
    if kind in ("llama3", "yarn") and not rope.get("factor"):
        yield f"rope_type {kind} without a factor"
    if kind == "yarn":
        if not rope.get("original_max_position_embeddings"):
            yield "rope_type yarn without original_max_position_embeddings"
        if rope.get("attention_factor"):
            yield (
                f"attention_factor of yarn = {json.dumps(rope['attention_factor'])} (Megatron "
                "computes it from factor, mscale and mscale_all_dim)"
            )
    if int(base) != base:
        yield f"rope_theta = {base} (Megatron has whole numbers)"


def window_of(arguments: Mapping[str, Any]) -> int | None:
    """The keys that a query sees, itself included; None: all before it.

    Megatron counts the keys beside the query, to its left and to its right; none are to the right
    of it in a model of text.
    """
    pair = arguments.get("window_size")
    if not is_window(pair) or pair[0] < 0:
        return None
    return int(pair[0]) + 1


def is_window(pair: Any) -> TypeGuard[Sequence[int]]:
    """Whether a `window_size` of Megatron's is one of a model of text: (keys, 0)."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return False
    return all(isinstance(one, int) for one in pair) and pair[0] >= -1 and pair[1] == 0


def window_arguments(window: int | None) -> dict[str, Any]:
    """Megatron's arguments for config.json's `sliding_window`."""
    return {"window_size": (window - 1, 0) if window else None}
