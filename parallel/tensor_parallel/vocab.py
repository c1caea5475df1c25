"""The vocabulary split over tensor-parallel ranks: embedding and cross-entropy.

Rank r holds rows [r * V // T, (r + 1) * V // T); V need not divide evenly. Exact-mode safe within
one tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import Communicator
from holdfast.parallel.pipeline import WeightGradientQueue


def embed(
    tokens: Tensor, weight: nn.Parameter, queue: WeightGradientQueue, first_row: int
) -> Tensor:
    """Rows of a vocabulary shard; zeros for tokens of other shards.

    Args:
        tokens: int64[seq, batch].
        weight: float[rows, hidden], the rows from `first_row` on.
    Returns:
        float[seq, batch, hidden]; the sum over the tensor group is the embedding. Local.
    """
    return _Embed.apply(tokens, weight, queue, first_row)  # pyrefly: ignore[bad-return]


def cross_entropy_sum(
    logits: Tensor,
    targets: Tensor,
    first_row: int,
    group: Communicator | None,
    ignored: Tensor | None = None,
) -> Tensor:
    """The sum over tokens of the cross-entropy, with logits split along the vocabulary.

    It is computed in float32 (float64 for float64 logits).

    Args:
        logits: float[seq, batch, rows], this rank's part of the vocabulary, from `first_row` on.
        targets: int64[seq, batch] in the whole vocabulary.
        ignored: bool[seq, batch], the places that count nothing, whatever stands there; None: none.
    Returns:
        float64 scalar, equal on all ranks of `group`. Collective over `group`.
    """
    return _CrossEntropySum.apply(  # pyrefly: ignore[bad-return]
        logits, targets, first_row, group, ignored
    )


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, queue: WeightGradientQueue, first_row: int
    ) -> Tensor:
        local = tokens - first_row
        outside = (local < 0) | (local >= weight.shape[0])
        local = local.masked_fill(outside, 0)
        ctx.save_for_backward(local, outside)
        ctx.queue, ctx.parameter = queue, weight
        output = weight[local]
        return output.masked_fill_(outside.unsqueeze(-1), 0.0) if outside.any() else output

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor | None, None, None]:
        local, outside = ctx.saved_tensors
        inside = ~outside.reshape(-1)
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        rows, place = torch.unique(local.reshape(-1)[inside], return_inverse=True)
        summed = flat.new_zeros(rows.numel(), flat.shape[-1])
        summed.index_add_(0, place, flat[inside])
        if not ctx.queue.has_sink:
            dense = torch.zeros_like(ctx.parameter)
            return None, dense.index_copy_(0, rows, summed), None, None
        ctx.queue.add_rows(ctx.parameter, rows, summed)
        return None, None, None, None


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        first_row: int,
        group: Communicator | None,
        ignored: Tensor | None,
    ) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        largest = wide.amax(-1)
        if group is not None:
            group.all_reduce(largest, "max").wait()
        exponentials = (wide - largest.unsqueeze(-1)).exp_()
        total = exponentials.sum(-1)
        local = targets - first_row
        outside = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(outside, 0)
        target = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1) - largest
        target = target.masked_fill(outside, 0.0)
        if group is not None:
            both = torch.stack([total, target])
            group.all_reduce(both).wait()
            total, target = both[0], both[1]
        probabilities = exponentials.div_(total.unsqueeze(-1))
        losses = total.log() - target
        if ignored is not None:
            probabilities.masked_fill_(ignored.unsqueeze(-1), 0.0)
            losses.masked_fill_(ignored, 0.0)
            outside = outside | ignored
        ctx.save_for_backward(probabilities, local, outside)
        ctx.dtype = logits.dtype
        return losses.double().sum()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, local, outside = ctx.saved_tensors
        scale = grad_output.to(probabilities.dtype)
        gradient = probabilities * scale
        share = torch.where(outside, 0.0, -scale).to(gradient.dtype).unsqueeze(-1)
        gradient.scatter_add_(-1, local.unsqueeze(-1), share)
        return gradient.to(ctx.dtype), None, None, None, None
