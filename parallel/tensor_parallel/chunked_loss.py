"""The head's loss by chunks of the vocabulary: the logits of a micro-batch are never whole.

Forward, each token's largest logit and sum of exponentials are kept up to date from chunk to chunk
(Milakov and Gimelshein 2018). Backward, the logits of each chunk are computed again (Wijmans et al.
2024). Its rows of the weight's gradient are a product over all tokens, so the weight has one
gradient of a micro-batch. Its part of the input's gradient is added in the order of the chunks.
Exact-mode safe within one tensor-parallel size and one size of chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.pipeline import WeightGradientQueue
from holdfast.parallel.tensor_parallel.linear import gather_rows, sum_scatter_rows
from holdfast.parallel.tensor_parallel.operators import TensorParallel


def chunked_cross_entropy_sum(
    value: Tensor,
    weight: nn.Parameter,
    queue: WeightGradientQueue,
    targets: Tensor,
    first_row: int,
    tp: TensorParallel,
    chunk: int,
    ignored: Tensor | None = None,
) -> Tensor:
    """The sum over tokens of the cross-entropy of the logits value @ weight.T.

    It equals `cross_entropy_sum` of a column-parallel layer up to rounding, is computed in float32
    (float64 for a float64 model), and keeps `value` and two numbers a token for backward.

    Args:
        value: float[seq (/ T), batch, hidden].
        weight: float[rows, hidden], this rank's part of the vocabulary, from `first_row` on.
        targets: int64[seq, batch] in the whole vocabulary.
        chunk: the rows of `weight` whose logits are in memory at once.
        ignored: bool[seq, batch], the places that count nothing, whatever stands there; None: none.
    Returns:
        float64 scalar, equal on all ranks of the group. Collective over the group of `tp`.
    """
    return _ChunkedLoss.apply(  # pyrefly: ignore[bad-return]
        value, weight, queue, targets, first_row, tp, chunk, ignored
    )


@dataclass(frozen=True, slots=True)
class _Logits:
    """A rank's part of the logits, computed by chunks."""

    hidden: Tensor
    """float[tokens, hidden]"""
    weight: Tensor
    """float[rows, hidden], without a graph."""
    targets: Tensor
    """int64[tokens], counted from this rank's first row: outside it for targets of other ranks."""
    chunk: int

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits: float[tokens, rows]) of each chunk, in float32 or wider, to be reused."""
        last = self.weight.shape[0]
        for start in range(0, last, self.chunk):
            rows = slice(start, min(start + self.chunk, last))
            logits = F.linear(self.hidden, self.weight[rows])
            yield rows, logits if logits.element_size() >= 4 else logits.float()

    def targets_in(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The targets as columns of a chunk (0 for others), and which are others: [tokens, 1]."""
        local = self.targets - rows.start
        outside = (local < 0) | (local >= rows.stop - rows.start)
        return local.masked_fill(outside, 0).unsqueeze(-1), outside.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class _LogitGradient:
    """The gradient of a rank's logits as blocks of columns, computed again by each iteration."""

    logits: _Logits
    largest: Tensor
    """float[tokens, 1]"""
    total: Tensor
    """The sum of exponentials over the whole vocabulary: float[tokens, 1]."""
    scale: Tensor
    """The gradient of each token's loss: a scalar of their dtype, or [tokens, 1]."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the weight, float[tokens, rows] in the dtype of the hidden states)."""
        for rows, wide in self.logits.chunks():
            gradient = wide.sub_(self.largest).exp_().div_(self.total).mul_(self.scale)
            columns, outside = self.logits.targets_in(rows)
            gradient.scatter_add_(-1, columns, torch.where(outside, 0.0, -self.scale))
            yield rows, gradient.to(self.logits.hidden.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        return (block for _, block in self.blocks())


def _statistics(logits: _Logits, tp: TensorParallel) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token the largest logit, the sum of exponentials below it, and the target's logit.

    Float[tokens, 1] each, the target's less the largest; over the whole vocabulary. Collective.
    """
    largest = total = target = torch.empty(0)
    for rows, wide in logits.chunks():
        columns, outside = logits.targets_in(rows)
        found = wide.gather(-1, columns).masked_fill_(outside, 0.0)
        highest = wide.amax(-1, keepdim=True)
        if rows.start == 0:
            largest, target = highest, found
            total = wide.sub_(highest).exp_().sum(-1, keepdim=True)
            continue
        highest = torch.maximum(largest, highest)
        total.mul_(largest.sub_(highest).exp_())
        total.add_(wide.sub_(highest).exp_().sum(-1, keepdim=True))
        largest = highest
        target.add_(found)
    rows = slice(0, logits.weight.shape[0])
    if tp.group is None:
        return largest, total, target.sub_(largest)
    highest = largest.clone()
    tp.group.all_reduce(highest, "max").wait()
    total.mul_(largest.sub_(highest).exp_())
    target = target.sub_(highest).masked_fill_(logits.targets_in(rows)[1], 0.0)
    both = torch.stack([total, target])
    tp.group.all_reduce(both).wait()
    return highest, both[0], both[1]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        weight: Tensor,
        queue: WeightGradientQueue,
        targets: Tensor,
        first_row: int,
        tp: TensorParallel,
        chunk: int,
        ignored: Tensor | None,
    ) -> Tensor:
        local = targets.reshape(-1) - first_row
        logits = _Logits(_whole(value, tp), weight.detach(), local, chunk)
        largest, total, target = _statistics(logits, tp)
        losses = total.log() - target
        if ignored is not None:
            ignored = ignored.reshape(-1, 1)
            losses.masked_fill_(ignored, 0.0)
        ctx.save_for_backward(value, weight, local, largest, total, ignored)
        ctx.queue, ctx.parameter, ctx.tp, ctx.chunk = queue, weight, tp, chunk
        return losses.double().sum()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        value, weight, local, largest, total, ignored = ctx.saved_tensors
        hidden, tp = _whole(value.detach(), ctx.tp), ctx.tp
        logits = _Logits(hidden, weight.detach(), local, ctx.chunk)
        scale = grad_output.to(total.dtype)
        if ignored is not None:
            scale = torch.where(ignored, 0.0, scale)
        gradient = _LogitGradient(logits, largest, total, scale)
        summed = torch.zeros(hidden.shape, dtype=total.dtype, device=hidden.device)
        blocks = _adding_input_gradient(gradient, summed)
        grad_weight = None
        if not ctx.needs_input_grad[1]:
            pass
        elif not ctx.queue.has_sink:
            grad_weight = torch.cat([block.t() @ hidden for block in blocks])
        elif not ctx.queue.defers:
            ctx.queue.put(ctx.parameter, blocks, hidden)
        for _ in blocks:  # those that the weight's gradient has not taken
            pass
        if ctx.needs_input_grad[1] and ctx.queue.defers:
            ctx.queue.put(ctx.parameter, gradient, hidden)
        grad_value = summed.to(value.dtype).view(-1, *value.shape[1:])
        if tp.group is not None and tp.sequence_parallel:
            grad_value = sum_scatter_rows(grad_value, tp.group)
        elif tp.group is not None:
            tp.group.all_reduce(grad_value).wait()
        return grad_value, grad_weight, None, None, None, None, None, None


def _whole(value: Tensor, tp: TensorParallel) -> Tensor:
    """Every token's hidden state: float[tokens, hidden]. Collective with sequence parallelism."""
    if tp.group is not None and tp.sequence_parallel:
        value = gather_rows(value, tp.group)
    return value.reshape(-1, value.shape[-1])


def _adding_input_gradient(gradient: _LogitGradient, summed: Tensor) -> Iterator[Tensor]:
    """The blocks of `gradient`; each one's part of the input's gradient is added to `summed`."""
    for rows, block in gradient.blocks():
        weight = gradient.logits.weight[rows]
        if block.dtype == summed.dtype:
            summed.addmm_(block, weight)
        else:
            summed.add_(block @ weight)
        yield block
