"""The vocabulary split over the parts of a layer: embedding and cross-entropy.

Part k of n holds rows [k * V // n, (k + 1) * V // n); V need not divide evenly. Exact-mode safe as
`TensorParallel` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.parallel.pipeline import WeightGradientQueue
from holdfast.parallel.tensor_parallel.split import TensorParallel
from holdfast.parallel.tensor_parallel.sums import tree_sum


def embed(
    tokens: Tensor,
    weights: Sequence[nn.Parameter],
    queue: WeightGradientQueue,
    first_rows: Sequence[int],
) -> Tensor:
    """Rows of a rank's parts of the vocabulary; zeros for tokens of others.

    Args:
        tokens: int64[seq, batch].
        weights: of each own part, float[rows, hidden].
        first_rows: the row of the vocabulary with which each of them begins.
    Returns:
        float[seq, batch, hidden]; the sum over the tensor group is the embedding. Local.
    """
    return _Embed.apply(tokens, queue, first_rows, *weights)  # pyrefly: ignore[bad-return]


def cross_entropy_sum(
    logits: Sequence[Tensor],
    targets: Tensor,
    first_rows: Sequence[int],
    tp: TensorParallel,
    ignored: Tensor | None = None,
    z_loss: float = 0.0,
    factors: Sequence[float] = (1.0,),
) -> Tensor:
    """The sum over tokens of the cross-entropy, with logits split along the vocabulary.

    It is computed in float32 (float64 for float64 logits).

    Args:
        logits: of each own part of the vocabulary, float[seq, batch, rows].
        targets: int64[seq, batch] in the whole vocabulary.
        first_rows: the row of the vocabulary with which each part begins.
        ignored: bool[seq, batch], the places that count nothing, whatever stands there; None: none.
        z_loss: the factor of the square of each token's logarithm of the sum of exponentials
            (Chowdhery et al. 2022), which is in the gradient and not in the sum.
        factors: of several, the batch has so many equal runs of sequences with a sum each, whose
            gradients have these factors.
    Returns:
        float64 scalar, or float64[factors] of several, equal on all ranks of the group of `tp`.
        Collective over it.
    """
    return _CrossEntropySum.apply(  # pyrefly: ignore[bad-return]
        targets, first_rows, tp, ignored, z_loss, factors, *logits
    )


def sums_of_runs(losses: Tensor, runs: int) -> Tensor:
    """The sum of the losses of all tokens, or of each of the equal runs of sequences.

    Args:
        losses: float[seq, batch].
    Returns:
        float64 scalar; of several runs, float64[runs].
    """
    wide = losses.double()
    return wide.sum() if runs == 1 else wide.view(len(wide), runs, -1).sum((0, 2))


def gradients_of_runs(gradient: Tensor, factors: Sequence[float], like: Tensor) -> Tensor:
    """The gradient of each token's loss, by that of the sums.

    Args:
        gradient: of what `sums_of_runs` returns.
        factors: those of the runs.
        like: float[seq, batch, ...]: has the dtype.
    Returns:
        A scalar; of several runs, float[1, batch].
    """
    if len(factors) == 1:
        return gradient.to(like.dtype)
    scaled = gradient * gradient.new_tensor(factors)
    return scaled.to(like.dtype).repeat_interleave(like.shape[1] // len(factors))[None]


def rows_here(targets: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """Entries of the vocabulary as rows of a part (0 for those of other parts), and which are."""
    local = targets - first_row
    outside = (local < 0) | (local >= rows)
    return local.masked_fill(outside, 0), outside


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        queue: WeightGradientQueue,
        first_rows: Sequence[int],
        *weights: Tensor,
    ) -> Tensor:
        places = [
            rows_here(tokens, first, weight.shape[0])
            for first, weight in zip(first_rows, weights, strict=True)
        ]
        ctx.save_for_backward(*(tensor for both in places for tensor in both))
        ctx.queue, ctx.parameters = queue, weights
        if len(weights) > 1:
            return _selected(weights, places)
        ((local, outside),) = places
        output = weights[0][local]
        return output.masked_fill_(outside.unsqueeze(-1), 0.0) if outside.any() else output

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        gradients: list[Tensor | None] = []
        for place, parameter in enumerate(ctx.parameters):
            local, outside = saved[2 * place : 2 * place + 2]
            inside = ~outside.reshape(-1)
            rows, where = torch.unique(local.reshape(-1)[inside], return_inverse=True)
            summed = flat.new_zeros(rows.numel(), flat.shape[-1])
            summed.index_add_(0, where, flat[inside])
            if ctx.queue.has_sink:
                ctx.queue.add_rows(parameter, rows, summed)
                gradients.append(None)
            else:
                gradients.append(torch.zeros_like(parameter).index_copy_(0, rows, summed))
        return None, None, None, *gradients


def _selected(weights: Sequence[Tensor], places: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The rows of several parts, as their sum would have them: zero has no sign."""
    tokens = places[0][0]
    output = weights[0].new_zeros(*tokens.shape, weights[0].shape[-1])
    for weight, (local, outside) in zip(weights, places, strict=True):
        inside = ~outside
        output[inside] = weight[local[inside]]
    return output.add_(0.0)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        targets: Tensor,
        first_rows: Sequence[int],
        tp: TensorParallel,
        ignored: Tensor | None,
        z_loss: float,
        factors: Sequence[float],
        *logits: Tensor,
    ) -> Tensor:
        wide = [part if part.dtype == torch.float64 else part.float() for part in logits]
        largest = wide[0].amax(-1)
        for part in wide[1:]:
            largest = torch.maximum(largest, part.amax(-1))
        largest = tp.largest(largest)
        exponentials, sums, places = [], [], []
        for part, first in zip(wide, first_rows, strict=True):
            exponentials.append((part - largest.unsqueeze(-1)).exp_())
            local, outside = rows_here(targets, first, part.shape[-1])
            target = part.gather(-1, local.unsqueeze(-1)).squeeze(-1) - largest
            sums.append(torch.stack([exponentials[-1].sum(-1), target.masked_fill(outside, 0.0)]))
            places.append((local, outside if ignored is None else outside | ignored))
        total, target = tp.sum_everywhere(tree_sum(sums))
        losses = total.log() - target
        if ignored is not None:
            losses.masked_fill_(ignored, 0.0)
        for part in exponentials:
            part.div_(total.unsqueeze(-1))
            if z_loss:
                part.mul_(z_factor(total, largest, z_loss).unsqueeze(-1))
            if ignored is not None:
                part.masked_fill_(ignored.unsqueeze(-1), 0.0)
        ctx.save_for_backward(*exponentials, *(tensor for both in places for tensor in both))
        ctx.dtype, ctx.factors = logits[0].dtype, factors
        return sums_of_runs(losses, len(factors))

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        parts = len(saved) // 3
        gradients = []
        for place, probabilities in enumerate(saved[:parts]):
            local, outside = saved[parts + 2 * place : parts + 2 * place + 2]
            scale = gradients_of_runs(grad_output, ctx.factors, probabilities)
            gradient = probabilities * (scale if scale.ndim == 0 else scale.unsqueeze(-1))
            share = torch.where(outside, 0.0, -scale).to(gradient.dtype).unsqueeze(-1)
            gradient.scatter_add_(-1, local.unsqueeze(-1), share)
            gradients.append(gradient.to(ctx.dtype))
        return *(None,) * 6, *gradients


def z_factor(total: Tensor, largest: Tensor, z_loss: float) -> Tensor:
    """The factor by which the z-loss increases the gradient by each token's probabilities.

    Args:
        total: of each token, the sum of exponentials of logits less the `largest`.
    """
    return (total.log() + largest).mul_(2 * z_loss).add_(1.0)
