"""Decoders of other sizes with the same structure: tiny ones, and a tensor rank's part."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any, TypeVar

import msgspec

from holdfast.trainer.models.decoder.section import (
    DecoderConfig,
    ExpertConfig,
    LearnedPositionsConfig,
)

_HEAD_DIM = 4
_WINDOW = 3
D = TypeVar("D", bound=DecoderConfig)


def tiny(model: D, tensor: int, layers: int, divisor: int) -> D:
    """A model of `layers` layers with small sizes that divide by `tensor` as before. Pure.

    Its heads divide by `divisor`, a multiple of `tensor`.

    These stay: head grouping, the distribution of key and value heads over tensor ranks, whether
    the vocabulary divides evenly, tied embeddings, dropout, and that some layers have a window, or
    no experts. Each part has at most three experts.
    """
    kv_heads = _fewest_kv_heads(model.kv_heads, tensor)
    group = min(model.heads // model.kv_heads, 2)
    while (kv_heads * group) % divisor:
        group += 1
    heads = kv_heads * group
    if isinstance(model, LearnedPositionsConfig):
        kv_heads = heads
    sizes: dict[str, Any] = {
        "from_hf": "",
        "layers": layers,
        "hidden": heads * _HEAD_DIM * (2 if model.head_dim else 1),
        "head_dim": _HEAD_DIM if model.head_dim else 0,
        "intermediate": 6 * tensor,
        "heads": heads,
        "kv_heads": kv_heads,
        "vocab": 12 * tensor + (0 if model.vocab % tensor == 0 else 1),
        "max_seq_len": max(8, 4 * tensor),
    }
    of_families = (
        *_sizes_of_layers(model, layers),
        *_sizes_of_experts(model, tensor),
        *_sizes_of_latents(model, heads),
    )
    sizes |= {key: size for key, size in of_families if hasattr(model, key)}
    return msgspec.structs.replace(model, **sizes)


def _sizes_of_layers(model: DecoderConfig, layers: int) -> Iterator[tuple[str, Any]]:
    """What sets layers apart; as many as leave a layer without it."""
    yield "sliding_window", min(getattr(model, "sliding_window", 0), _WINDOW)
    yield "max_window_layers", min(getattr(model, "max_window_layers", 0), layers // 2)
    dense = getattr(model, "dense_layers", ())
    yield "dense_layers", tuple(range(min(len(dense), layers - 1)))


def _sizes_of_experts(model: DecoderConfig, tensor: int) -> Iterator[tuple[str, Any]]:
    if isinstance(model, ExpertConfig):
        count = tensor * min(max(1, model.experts // tensor), 3)
        yield "experts", count
        yield "experts_per_token", min(model.experts_per_token, count, 3)
        yield "expert_intermediate", max(5, tensor)  # parts of a shared expert have features, too
        yield "expert_groups", 1
        yield "groups_per_token", 1


def _sizes_of_latents(model: DecoderConfig, heads: int) -> Iterator[tuple[str, Any]]:
    if hasattr(model, "key_value_rank"):
        yield "query_rank", min(getattr(model, "query_rank", 0), 10)
        yield "key_value_rank", 6
        yield "plain_head_dim", 4
        yield "rope_head_dim", 2
        yield "value_head_dim", 4
        yield "head_dim", 0
        yield "kv_heads", heads


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
