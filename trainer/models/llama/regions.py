"""The pure functions of a Llama layer, which `train.compile` compiles: see `models/compilation.py`.

Shapes are those of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.layout import even_range
from holdfast.trainer.models.compilation import Region
from holdfast.trainer.models.family import RegionSizes
from holdfast.trainer.models.section import ModelConfig


def norm(value: Tensor, weight: Tensor, eps: float) -> Tensor:
    """value / sqrt(mean(value^2) + eps) * weight, in float32 or wider."""
    if value.element_size() < 4:
        wide = F.rms_norm(value.float(), value.shape[-1:], None, eps)
        return wide.to(value.dtype) * weight
    return F.rms_norm(value, value.shape[-1:], weight, eps)


class RotaryTables(NamedTuple):
    """The rotary embedding's cos and sin: float[seq, head_dim / 2].

    They are computed in float32, and have the type of the model.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(
        cls, model: ModelConfig, seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> RotaryTables:
        """The tables of positions 0 to seq_len - 1."""
        dim = model.dim_per_head
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        frequencies = 1.0 / model.rope_theta**exponents
        positions = torch.arange(seq_len, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))


def _rotated(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`value` rotated: float[batch, heads, seq, head_dim], positions 0 to seq - 1."""
    first, second = value.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Rotary embedding and causal grouped-query attention.

    Args:
        projected: float[seq, batch, (heads + 2 kv_heads) dim].
        cos, sin: the rotary tables, for at least as many positions.
    Returns:
        float[seq, batch, heads dim].
    """
    seq, batch, _ = projected.shape
    cos, sin = cos[:seq], sin[:seq]
    split = projected.view(seq, batch, heads + 2 * kv_heads, -1).permute(1, 2, 0, 3)
    q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
    mixed = F.scaled_dot_product_attention(
        _rotated(q, cos, sin),
        _rotated(k, cos, sin),
        v,
        is_causal=True,
        enable_gqa=heads != kv_heads,
    )
    return mixed.permute(2, 0, 1, 3).reshape(seq, batch, -1)


def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU of both projections: float[..., 2 intermediate] -> float[..., intermediate]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def heads_of(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """The query heads, and the key and value heads, of each of `tensor` ranks."""
    return model.heads // tensor, max(1, model.kv_heads // tensor)


def regions(model: ModelConfig, sizes: RegionSizes) -> Iterator[Region]:
    """The regions of a layer; the head's norm is one of them."""

    def value(rows: int, features: int) -> Tensor:
        return torch.empty(
            rows,
            sizes.micro_batch,
            features,
            dtype=sizes.dtype,
            device=sizes.device,
            requires_grad=True,
        )

    weight = nn.Parameter(torch.empty(model.hidden, dtype=sizes.dtype, device=sizes.device))
    yield Region(norm, (value(sizes.rows, model.hidden), weight, model.norm_eps))
    heads, kv_heads = heads_of(model, sizes.tensor)
    tables = RotaryTables.of(model, sizes.seq_len, sizes.dtype, sizes.device)
    projected = value(sizes.seq_len, (heads + 2 * kv_heads) * model.dim_per_head)
    yield Region(attend, (projected, *tables, heads, kv_heads))
    parts = {
        stop - start
        for index in range(sizes.tensor)
        for start, stop in [even_range(model.intermediate, sizes.tensor, index)]
    }
    for part in sorted(parts):
        yield Region(gate, (value(sizes.seq_len, 2 * part),))
