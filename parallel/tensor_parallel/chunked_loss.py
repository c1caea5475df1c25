"""The head's loss by chunks of the vocabulary: the logits of a micro-batch are never whole.

Forward, each token's largest logit and sum of exponentials are kept up to date from chunk to chunk
(Milakov and Gimelshein 2018). Backward, the logits of each chunk are computed again (Wijmans et al.
2024). Its rows of the weight's gradient are a product over all tokens, so the weight has one
gradient of a micro-batch. Its part of the input's gradient is added in the order of the chunks.
Exact-mode safe within one size of chunks, as `TensorParallel` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.pipeline import WeightGradientQueue
from holdfast.parallel.tensor_parallel.split import TensorParallel
from holdfast.parallel.tensor_parallel.sums import tree_sum
from holdfast.parallel.tensor_parallel.vocab import gradients_of_runs, sums_of_runs, z_factor


def chunked_cross_entropy_sum(
    value: Tensor,
    weights: Sequence[nn.Parameter],
    queue: WeightGradientQueue,
    targets: Tensor,
    first_rows: Sequence[int],
    tp: TensorParallel,
    chunk: int,
    ignored: Tensor | None = None,
    z_loss: float = 0.0,
    factors: Sequence[float] = (1.0,),
) -> Tensor:
    """The sum over tokens of the cross-entropy of the logits value @ weight.T.

    It equals `cross_entropy_sum` of a column-parallel layer up to rounding, is computed in float32
    (float64 for a float64 model), and keeps `value` and two numbers a token for backward.

    Args:
        value: float[seq (/ T), batch, hidden].
        weights: of each own part of the vocabulary, float[rows, hidden].
        targets: int64[seq, batch] in the whole vocabulary.
        first_rows: the row of the vocabulary with which each part begins.
        chunk: the rows of a part whose logits are in memory at once.
        ignored: bool[seq, batch], the places that count nothing, whatever stands there; None: none.
        z_loss, factors: as of `cross_entropy_sum`.
    Returns:
        float64 scalar, or float64[factors] of several, equal on all ranks of the group. Collective
        over the group of `tp`.
    """
    return _ChunkedLoss.apply(  # pyrefly: ignore[bad-return]
        value, queue, targets, first_rows, tp, chunk, ignored, z_loss, factors, *weights
    )


@dataclass(frozen=True, slots=True)
class _Logits:
    """A part of the logits, computed by chunks."""

    hidden: Tensor
    """float[tokens, hidden]"""
    weight: Tensor
    """float[rows, hidden], without a graph."""
    targets: Tensor
    """int64[tokens], counted from the part's first row: outside it for targets of other parts."""
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
    """The gradient of a part's logits as blocks of columns, computed again by each iteration."""

    logits: _Logits
    largest: Tensor
    """float[tokens, 1]"""
    total: Tensor
    """The sum of exponentials over the whole vocabulary: float[tokens, 1]."""
    scale: Tensor
    """The gradient of each token's loss: a scalar of their dtype, or [tokens, 1]."""
    z_loss: float

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the weight, float[tokens, rows] in the dtype of the hidden states)."""
        for rows, wide in self.logits.chunks():
            gradient = wide.sub_(self.largest).exp_().div_(self.total).mul_(self.scale)
            if self.z_loss:
                gradient.mul_(z_factor(self.total, self.largest, self.z_loss))
            columns, outside = self.logits.targets_in(rows)
            gradient.scatter_add_(-1, columns, torch.where(outside, 0.0, -self.scale))
            yield rows, gradient.to(self.logits.hidden.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        return (block for _, block in self.blocks())


def _statistics(logits: _Logits) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token the largest logit, the sum of exponentials below it, and the target's logit.

    Float[tokens, 1] each, over one part of the vocabulary; the target's is 0 in other parts.
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
    return largest, total, target


def _joint_statistics(
    parts: Sequence[_Logits], tp: TensorParallel
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_statistics`, over the whole vocabulary; the target's less the largest. Collective."""
    found = [_statistics(logits) for logits in parts]
    if tp.parts == 1:
        ((largest, total, target),) = found
        return largest, total, target.sub_(largest)
    highest = found[0][0].clone()
    for largest, _, _ in found[1:]:
        highest = torch.maximum(highest, largest)
    highest = tp.largest(highest)
    sums = []
    for logits, (largest, total, target) in zip(parts, found, strict=True):
        total.mul_(largest.sub_(highest).exp_())
        outside = logits.targets_in(slice(0, logits.weight.shape[0]))[1]
        sums.append(torch.stack([total, target.sub_(highest).masked_fill_(outside, 0.0)]))
    both = tp.sum_everywhere(tree_sum(sums))
    return highest, both[0], both[1]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        queue: WeightGradientQueue,
        targets: Tensor,
        first_rows: Sequence[int],
        tp: TensorParallel,
        chunk: int,
        ignored: Tensor | None,
        z_loss: float,
        factors: Sequence[float],
        *weights: Tensor,
    ) -> Tensor:
        locals_ = [targets.reshape(-1) - first for first in first_rows]
        hidden = _tokens(tp.whole(value))
        parts = [
            _Logits(hidden, weight.detach(), local, chunk)
            for weight, local in zip(weights, locals_, strict=True)
        ]
        largest, total, target = _joint_statistics(parts, tp)
        losses = total.log() - target
        if ignored is not None:
            ignored = ignored.reshape(-1, 1)
            losses.masked_fill_(ignored, 0.0)
        ctx.save_for_backward(value, largest, total, ignored, *weights, *locals_)
        ctx.queue, ctx.parameters, ctx.tp, ctx.chunk = queue, weights, tp, chunk
        ctx.z_loss, ctx.factors, ctx.sequences = z_loss, factors, targets.shape[1]
        return sums_of_runs(losses.view_as(targets), len(factors))

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        value, largest, total, ignored, *rest = ctx.saved_tensors
        weights, locals_ = rest[: len(ctx.parameters)], rest[len(ctx.parameters) :]
        tp, hidden = ctx.tp, _tokens(ctx.tp.whole(value.detach()))
        scale = gradients_of_runs(grad_output, ctx.factors, total.view(-1, ctx.sequences))
        if scale.ndim:  # one for each token
            scale = scale.expand(len(total) // ctx.sequences, -1).reshape(-1, 1)
        if ignored is not None:
            scale = torch.where(ignored, 0.0, scale)
        partials, gradients = [], []
        needed = ctx.needs_input_grad[9:]
        for parameter, is_needed, weight, local in zip(
            ctx.parameters, needed, weights, locals_, strict=True
        ):
            logits = _Logits(hidden, weight.detach(), local, ctx.chunk)
            gradient = _LogitGradient(logits, largest, total, scale, ctx.z_loss)
            put = ctx.queue if is_needed else None
            partial, found = _part_gradients(gradient, parameter, put)
            partials.append(partial.to(value.dtype).view(-1, *value.shape[1:]))
            gradients.append(found)
        return tp.sum(partials), *(None,) * 8, *gradients


def _part_gradients(
    gradient: _LogitGradient, parameter: nn.Parameter, queue: WeightGradientQueue | None
) -> tuple[Tensor, Tensor | None]:
    """One part's share of the input's gradient, and the weight's where the queue has no sink.

    Args:
        queue: takes the weight's gradient; None: it is not needed.
    """
    hidden = gradient.logits.hidden
    summed = torch.zeros(hidden.shape, dtype=gradient.total.dtype, device=hidden.device)
    blocks = _adding_input_gradient(gradient, summed)
    found = None
    if queue is not None and not queue.has_sink:
        found = torch.cat([block.t() @ hidden for block in blocks])
    elif queue is not None and not queue.defers:
        queue.put(parameter, blocks, hidden)
    for _ in blocks:  # those that the weight's gradient has not taken
        pass
    if queue is not None and queue.has_sink and queue.defers:
        queue.put(parameter, gradient, hidden)
    return summed, found


def _tokens(value: Tensor) -> Tensor:
    """Every token's hidden state: float[tokens, hidden]."""
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
