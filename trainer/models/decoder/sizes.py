"""Decoders of other sizes with the same structure: tiny ones, and a tensor rank's part."""

from __future__ import annotations

from math import gcd
from typing import Any, TypeVar

import msgspec

from holdfast.trainer.models.decoder.section import (
    DecoderConfig,
    ExpertConfig,
    LayeredWindowConfig,
    LearnedPositionsConfig,
    WindowedConfig,
)

_HEAD_DIM = 4
_WINDOW = 3
D = TypeVar("D", bound=DecoderConfig)


def tiny(model: D, tensor: int, layers: int, divisor: int) -> D:
    """A model of `layers` layers with small sizes that divide by `tensor` as before. Pure.

    Its heads divide by `divisor`, a multiple of `tensor`.

    These stay: head grouping, the distribution of key and value heads over tensor ranks, whether
    the vocabulary divides evenly, tied embeddings, dropout, and that some layers have a window.
    Each part has at most three experts.
    """
    kv_heads = _fewest_kv_heads(model.kv_heads, tensor)
    group = min(model.heads // model.kv_heads, 2)
    while (kv_heads * group) % divisor:
        group += 1
    heads = kv_heads * group
    others: dict[str, Any] = {}
    if isinstance(model, LearnedPositionsConfig):
        kv_heads = heads
    if isinstance(model, WindowedConfig):
        others["sliding_window"] = min(model.sliding_window, _WINDOW)
    if isinstance(model, LayeredWindowConfig):
        others["max_window_layers"] = min(model.max_window_layers, layers // 2)
    if isinstance(model, ExpertConfig):
        others["experts"] = tensor * min(max(1, model.experts // tensor), 3)
        others["experts_per_token"] = min(model.experts_per_token, others["experts"], 3)
    if hasattr(model, "expert_intermediate"):
        others["expert_intermediate"] = 5
    return msgspec.structs.replace(
        model,
        from_hf="",
        layers=layers,
        hidden=heads * _HEAD_DIM * (2 if model.head_dim else 1),
        head_dim=_HEAD_DIM if model.head_dim else 0,
        intermediate=6 * tensor,
        heads=heads,
        kv_heads=kv_heads,
        vocab=12 * tensor + (0 if model.vocab % tensor == 0 else 1),
        max_seq_len=max(8, 4 * tensor),
        **others,
    )


def _fewest_kv_heads(kv_heads: int, tensor: int) -> int:
    """The smallest count that tensor ranks split, or share, in the same way as `kv_heads`."""
    if kv_heads % tensor == 0:
        return tensor * min(kv_heads // tensor, 2)
    return gcd(kv_heads, tensor)


def tensor_share(model: D, tensor: int) -> D:
    """A one-layer model with as many heads and features as one of `tensor` ranks computes. Pure."""
    return msgspec.structs.replace(
        model,
        layers=1,
        head_dim=model.dim_per_head,
        heads=max(1, model.heads // tensor),
        kv_heads=max(1, model.kv_heads // tensor),
        intermediate=max(1, model.intermediate // tensor),
    )
