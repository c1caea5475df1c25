"""The pure functions of a decoder's layer, which `train.compile` compiles: see
`models/compilation.py`.

Shapes are those of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.context_parallel import ContextParallel, Note, Work
from holdfast.parallel.layout import Slices, even_range
from holdfast.parallel.pipeline import Documents
from holdfast.trainer.models.compilation import Region
from holdfast.trainer.models.decoder.rotary import RotaryTables, rotated, tables_of
from holdfast.trainer.models.decoder.section import (
    LATENT_NORM_EPS,
    DecoderConfig,
    Design,
    is_windowed,
)
from holdfast.trainer.models.family import RegionSizes
from holdfast.trainer.models.section import ModelConfig


def norm(value: Tensor, weight: Tensor, eps: float) -> Tensor:
    """value / sqrt(mean(value^2) + eps) * weight, in float32 or wider."""
    if value.element_size() < 4:
        wide = F.rms_norm(value.float(), value.shape[-1:], None, eps)
        return wide.to(value.dtype) * weight
    return F.rms_norm(value, value.shape[-1:], weight, eps)


def layer_norm(value: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(value - mean) / sqrt(variance + eps) * weight + bias, in float32 or wider."""
    wide = value.float() if value.element_size() < 4 else value
    # torch's own sums of the weights' gradients would depend on the number of threads.
    normed = F.layer_norm(wide, value.shape[-1:], None, None, eps)
    return torch.addcmul(bias.to(wide.dtype), normed, weight.to(wide.dtype)).to(value.dtype)


class HeadNorms(NamedTuple):
    """The weights of the norms of each head's queries and keys: float[head_dim] each."""

    query: Tensor | None = None
    """None: there are no such norms."""
    key: Tensor | None = None
    eps: float = 0.0


def attend(
    projected: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotary embedding and causal grouped-query attention.

    Args:
        projected: float[seq, batch, (heads + 2 kv_heads) dim].
        cos, sin: the rotary tables, for at least as many positions; None: nothing is rotated.
        query_norm, key_norm, eps: as of `HeadNorms`.
    Returns:
        float[seq, batch, heads dim].
    """
    seq, batch, _ = projected.shape
    norms = HeadNorms(query_norm, key_norm, eps)
    tables = RotaryTables(cos, sin).within(slice(seq))
    q, k, v = _heads(projected, tables, heads, kv_heads, norms)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return mixed.permute(2, 0, 1, 3).reshape(seq, batch, -1)


def attend_within(
    projected: Tensor,
    rotary: RotaryTables,
    documents: Documents,
    heads: int,
    kv_heads: int,
    norms: HeadNorms,
) -> Tensor:
    """As `attend`, with positions of their own in each document, and no attention across.

    Each document is a call of its own: the work is that of the documents' squares, and a document's
    bits do not depend on its neighbours.
    """
    seq, batch, _ = projected.shape
    of_heads = _heads(projected, rotary.at(documents.positions), heads, kv_heads, norms)
    # float[heads, batch seq, head_dim], cut between documents
    q, k, v = (
        part.transpose(0, 1).flatten(1, 2).split(documents.lengths, dim=1) for part in of_heads
    )
    mixed = [
        F.scaled_dot_product_attention(
            own_q[None], own_k[None], own_v[None], is_causal=True, enable_gqa=heads != kv_heads
        )
        for own_q, own_k, own_v in zip(q, k, v, strict=True)
    ]
    joined = torch.cat(mixed, dim=2).view(heads, batch, seq, -1)
    return joined.permute(2, 1, 0, 3).reshape(seq, batch, -1)


def attend_sliced(
    projected: Sequence[Tensor],
    rotary: RotaryTables,
    context: ContextParallel,
    slices: Slices,
    documents: Documents | None,
    heads: int,
    kv_heads: int,
    norms: Sequence[HeadNorms],
    window: int,
    kept: dict[object, Any],
    name: object,
    note: Note | None,
) -> list[Tensor]:
    """As `attend`, of each of a rank's slices; with documents, as `attend_within`. Collective over
    the context group.

    Args:
        norms: of each slice.
        window, kept, name, note: as of `ContextParallel.attend`.
    """
    of_slices = []
    for number, value, of_slice in zip(slices.own, projected, norms, strict=True):
        places = slices.tokens(number)
        tables = rotary.within(places)
        if documents is not None:
            tables = rotary.at(documents.positions[places])
        of_slices.append(_heads(value, tables, heads, kv_heads, of_slice))
    q, k, v = zip(*of_slices, strict=True)
    mixed = context.attend(q, k, v, slices, documents, kept, name, window, note)
    return [value.permute(2, 0, 1, 3).flatten(2) for value in mixed]


@torch.no_grad()
def note_logits(
    projected: Tensor,
    rotary: RotaryTables,
    slices: Slices,
    documents: Documents | None,
    heads: int,
    kv_heads: int,
    norms: HeadNorms,
    note: Note,
) -> None:
    """Note the largest logits of a sequence's only slice, as attention computes them. Local.

    Args:
        projected: as of `attend`.
    """
    seq, batch, _ = projected.shape
    tables = rotary.within(slice(seq)) if documents is None else rotary.at(documents.positions)
    query, key, _ = _heads(projected, tables, heads, kv_heads, norms)
    Work(slices, documents, batch, note=note).note_logits(0, query, key)


def _heads(
    projected: Tensor, rotary: RotaryTables, heads: int, kv_heads: int, norms: HeadNorms
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, rotated: float[batch, heads, seq, head_dim] each."""
    seq, batch, _ = projected.shape
    split = projected.view(seq, batch, heads + 2 * kv_heads, -1).permute(1, 2, 0, 3)
    q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
    if norms.query is not None and norms.key is not None:
        q, k = norm(q, norms.query, norms.eps), norm(k, norms.key, norms.eps)
    cos, sin = rotary
    if cos is None or sin is None:
        return q, k, v
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU of both projections: float[..., 2 intermediate] -> float[..., intermediate]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu(value: Tensor, approximate: str) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016), exact ("none") or by a hyperbolic tangent ("tanh")."""
    return F.gelu(value, approximate=approximate)


def heads_of(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """The query heads, and the key and value heads, of each of `tensor` ranks."""
    return model.heads // tensor, max(1, model.kv_heads // tensor)


def regions(model: DecoderConfig, design: Design, sizes: RegionSizes) -> Iterator[Region]:
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

    def weight(elements: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(elements, dtype=sizes.dtype, device=sizes.device))

    hidden, own = value(sizes.rows, model.hidden), weight(model.hidden)
    if design.layer_norm:
        yield Region(layer_norm, (hidden, own, weight(model.hidden), model.norm_eps))
    else:
        yield Region(norm, (hidden, own, model.norm_eps))
    heads, kv_heads = heads_of(model, sizes.tensor)
    latent = design.latent
    for width in () if latent is None else dict.fromkeys((latent.query_rank, latent.rank)):
        if width:
            yield Region(norm, (value(sizes.rows, width), weight(width), LATENT_NORM_EPS))
    tables = tables_of(model, design, sizes.seq_len, sizes.dtype, sizes.device)
    if sizes.tokens == sizes.seq_len and not all(
        is_windowed(design.window(layer), sizes.seq_len) for layer in range(model.layers)
    ):
        dim = model.dim_per_head
        projected = value(sizes.seq_len, (heads + 2 * kv_heads) * dim)
        norms = (weight(dim), weight(dim), model.norm_eps) if design.head_norms else ()
        yield Region(attend, (projected, *tables, heads, kv_heads, *norms))
    experts = design.experts
    dense = range(model.layers) if experts is None else experts.dense_layers
    widths = [model.intermediate] * bool(dense)
    if experts is not None and experts.shared:
        widths.append(experts.shared)
    parts = {
        stop - start
        for width in widths
        for index in range(sizes.tensor)
        for start, stop in [even_range(width, sizes.tensor, index)]
    }
    for part in sorted(parts):
        if design.gelu:
            yield Region(gelu, (value(sizes.tokens, part), design.gelu))
        else:
            yield Region(gate, (value(sizes.tokens, 2 * part),))
