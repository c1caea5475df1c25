"""Attention of some queries to some keys, with what it takes to join parts of the keys.

The kernels are torch's. They give, beside the output, each query's logarithm of the sum of its
exponentials. Over two parts of the keys outputs are joined by it, and each part's gradients follow
from the joined output alone (Liu et al. 2023, ring attention).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from holdfast import _native

_MERGE = {
    torch.float32: _native.merge_attention_f32,
    torch.bfloat16: _native.merge_attention_bf16,
    torch.float64: _native.merge_attention_f64,
}


class Attended(NamedTuple):
    """The attention of some queries."""

    output: Tensor
    """float[batch, heads, queries, head_dim]"""
    logsumexp: Tensor
    """float[batch, heads, queries], float32 or wider."""


class AttentionGradients(NamedTuple):
    """The gradients of one part of the keys."""

    query: Tensor
    key: Tensor
    value: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None = None
) -> Attended:
    """Attention to all keys, or to those up to a query's own place.

    Args:
        query: float[batch, heads, queries, head_dim].
        key, value: float[batch, kv_heads, keys, head_dim]; kv_heads divides heads.
        causal: there are as many keys as queries, and query i attends to keys 0 to i.
        mask: what is added to scores, float[queries, keys] of the type of queries.
    """
    if query.device.type == "cpu":
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask
        )
        return Attended(output, logsumexp)
    return _attend_plainly(query, key, value, causal, mask)


def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Attended,
    *,
    causal: bool,
    mask: Tensor | None = None,
) -> AttentionGradients:
    """The gradients by queries, keys and values of one part.

    Args:
        gradient: by the output.
        attended: over all parts of the keys; so gradients by queries are summed over parts.
    """
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, *attended, 0.0, causal, attn_mask=mask
        )
        return AttentionGradients(*found)
    return _plain_backward(gradient, query, key, value, attended, causal, mask)


def merge(first: Attended, second: Attended) -> Attended:
    """The attention over both parts, in the memory of `first`; each row by itself.

    Whatever other rows there are, a row's bits are the same: torch's elementwise functions take the
    last few elements of a tensor another way.
    """
    output, logsumexp = first.output.contiguous(), first.logsumexp.contiguous()
    if output.device.type != "cpu":
        joined = torch.logaddexp(logsumexp, second.logsumexp)
        weights = ((logsumexp - joined).exp(), (second.logsumexp - joined).exp())
        parts = (output, second.output)
        summed = sum(part * w.unsqueeze(-1) for part, w in zip(parts, weights, strict=True))
        return Attended(torch.as_tensor(summed).to(output.dtype), joined)
    other, other_sums = second.output.contiguous(), second.logsumexp.contiguous()
    _MERGE[output.dtype](
        output.data_ptr(),
        logsumexp.data_ptr(),
        other.data_ptr(),
        other_sums.data_ptr(),
        logsumexp.numel(),
        output.shape[-1],
    )
    return Attended(output, logsumexp)


def _scores(query: Tensor, key: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """float[batch, heads, queries, keys], float32 or wider."""
    wide = query if query.element_size() >= 4 else query.float()
    scores = wide @ _per_head(key, query).to(wide.dtype).transpose(-1, -2)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores if mask is None else scores + mask


def _per_head(key: Tensor, query: Tensor) -> Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def _attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None
) -> Attended:
    """`attend` by its definition, for devices without a kernel here."""
    scores = _scores(query, key, causal, mask)
    logsumexp = scores.logsumexp(-1)
    weights = (scores - logsumexp.unsqueeze(-1)).exp()
    output = weights @ _per_head(value, query).to(weights.dtype)
    return Attended(output.to(query.dtype), logsumexp)


def _plain_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Attended,
    causal: bool,
    mask: Tensor | None = None,
) -> AttentionGradients:
    """`attend_backward` by its definition."""
    scores = _scores(query, key, causal, mask)
    weights = (scores - attended.logsumexp.unsqueeze(-1)).exp()
    wide = gradient.to(weights.dtype)
    by_weights = wide @ _per_head(value, query).to(wide.dtype).transpose(-1, -2)
    inner = (wide * attended.output.to(wide.dtype)).sum(-1, keepdim=True)
    by_scores = weights * (by_weights - inner) * query.shape[-1] ** -0.5
    group = (key.shape[1], query.shape[1] // key.shape[1])
    by_value = (weights.transpose(-1, -2) @ wide).unflatten(1, group).sum(2)
    by_key = (by_scores.transpose(-1, -2) @ query.to(wide.dtype)).unflatten(1, group).sum(2)
    by_query = by_scores @ _per_head(key, query).to(wide.dtype)
    return AttentionGradients(
        by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype)
    )
