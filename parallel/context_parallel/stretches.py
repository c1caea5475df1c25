"""Attention of the stretches of a sequence, which pass a chunk one after another.

The keys and values of a stretch stay here for those after it, and the sums of their gradients for
those before: a stretch goes backward after all later ones, so what its own keys have got is
complete. Each slice is computed as if all came at once, with the same bits. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.context_parallel.attention import (
    KeyGradients,
    Work,
    slice_backward,
    slice_forward,
)
from holdfast.parallel.context_parallel.kernels import Attended


@dataclass(slots=True)
class _Keys:
    """The keys and values of the stretches of a micro-batch that have been here."""

    keys: Tensor
    """float[micro_batch, kv_heads, seq, head_dim]"""
    values: Tensor
    gradients: KeyGradients | None = None
    """The sums by both, from the first backward pass on."""

    def put(self, work: Work, key: Sequence[Tensor], value: Sequence[Tensor]) -> None:
        """Keep those of a stretch. When they are computed again they have the same bits."""
        for whole, parts in ((self.keys, key), (self.values, value)):
            for number, part in zip(work.slices.numbers, parts, strict=True):
                whole[:, :, work.slices.tokens(number)] = part


def stretch_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    work: Work,
    *,
    kept: dict[object, Any],
    name: object,
) -> list[Tensor]:
    """Attention of the slices of a stretch, on this rank. Local.

    Args:
        query, key, value: as of `sliced_attention`, of each slice of the stretch.
        kept: what is kept between stretches of the micro-batch.
        name: that of this attention in it.
    Returns:
        Of each slice, float[micro_batch, heads, length, head_dim].
    """
    return list(_StretchAttention.apply(work, kept, name, *query, *key, *value))


class _StretchAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: Work, kept: dict[object, Any], name: object, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        slices = work.slices
        count = len(slices.numbers)
        query, key, value = (tensors[n * count : (n + 1) * count] for n in range(3))
        if name not in kept:
            batch, heads, length, dim = key[0].shape
            shape = (batch, heads, length * slices.count, dim)
            kept[name] = _Keys(key[0].new_empty(shape), value[0].new_empty(shape))
        known: _Keys = kept[name]
        known.put(work, key, value)
        found = [
            slice_forward(work, number, part, known.keys, known.values)
            for number, part in zip(slices.numbers, query, strict=True)
        ]
        if not any(ctx.needs_input_grad) and slices.numbers.stop == slices.count:
            del kept[name]  # nothing goes backward
        ctx.work, ctx.kept, ctx.name = work, kept, name
        ctx.save_for_backward(*query, *(part for one in found for part in one))
        return tuple(one.output for one in found)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work, known = ctx.work, ctx.kept[ctx.name]
        numbers = work.slices.numbers
        saved = ctx.saved_tensors  # recomputed ones may be asked for once
        query, found = saved[: len(numbers)], saved[len(numbers) :]
        if known.gradients is None:
            known.gradients = KeyGradients(known.keys, known.values)
        by_query: list[Tensor] = []
        for place in reversed(range(len(numbers))):
            attended = Attended(*found[2 * place : 2 * place + 2])
            by_query.append(
                slice_backward(
                    work, numbers[place], gradients[place], query[place], attended, known.gradients
                )
            )
        own = [
            part[:, :, work.slices.tokens(number)].to(known.keys.dtype)
            for part in known.gradients.both
            for number in numbers
        ]
        if numbers.start == 0:
            del ctx.kept[ctx.name]
        return None, None, None, *reversed(by_query), *own
