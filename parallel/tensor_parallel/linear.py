"""Linear layers with a queue for weight gradients, so that a backward pass can be split.

The backward pass of each layer computes only the input's gradient, and hands the weight's to the
chunk's `WeightGradientQueue`, exactly once. Exact-mode safe: the matrix products are the same in
every schedule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.comm import Communicator
from holdfast.parallel.pipeline import WeightGradientQueue


def linear(value: Tensor, weight: nn.Parameter, queue: WeightGradientQueue) -> Tensor:
    """value @ weight.T; value: float[..., in], weight: float[out, in] -> float[..., out]. Local."""
    return _Linear.apply(value, weight, queue)  # pyrefly: ignore[bad-return]


def in_slice(weight: nn.Parameter, queue: WeightGradientQueue) -> Tensor:
    """The weight for one slice, whose gradient is added by itself. Local.

    Autograd alone would add the gradients of all slices as floats first. Without a sink it does.
    """
    return _InSlice.apply(weight, queue)  # pyrefly: ignore[bad-return]


class _InSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, queue: WeightGradientQueue) -> Tensor:
        ctx.queue, ctx.parameter = queue, weight
        return weight.view_as(weight)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.queue.has_sink:
            return gradient, None
        ctx.queue.add(ctx.parameter, gradient)
        return None, None


def gathered_linear(
    value: Tensor, weight: nn.Parameter, queue: WeightGradientQueue, group: Communicator
) -> Tensor:
    """A column-parallel linear layer on a sequence shard.

    Input float[seq / T, batch, in], output float[seq, batch, out / T]. It gathers the sequence,
    forward and again backward, so that only the shard is kept (Korthikanti et al. 2022, section
    4.2.2). The input's gradient is reduce-scattered. Collective over `group`.
    """
    return _GatheredLinear.apply(value, weight, queue, group)  # pyrefly: ignore[bad-return]


def _matrix(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _weight_gradient(
    ctx: Any, weight: Tensor, queue: WeightGradientQueue, grad_output: Tensor, value: Tensor
) -> Tensor | None:
    if not ctx.needs_input_grad[1]:
        return None
    if not queue.has_sink:
        return _matrix(grad_output).t() @ _matrix(value)
    queue.put(ctx.parameter, (_matrix(grad_output),), _matrix(value))
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, queue: WeightGradientQueue) -> Tensor:
        ctx.save_for_backward(value, weight)
        ctx.queue, ctx.parameter = queue, weight
        return F.linear(value, weight)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        value, weight = ctx.saved_tensors
        grad_value = grad_output @ weight if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(ctx, weight, ctx.queue, grad_output, value)
        return grad_value, grad_weight, None


def gather_rows(value: Tensor, group: Communicator) -> Tensor:
    """The members' `value`, one after the other along dim 0, without autograd. Collective."""
    value = value.contiguous()
    gathered = value.new_empty(group.size * value.shape[0], *value.shape[1:])
    group.all_gather(list(gathered.chunk(group.size)), value).wait()
    return gathered


def sum_scatter_rows(value: Tensor, group: Communicator) -> Tensor:
    """This member's part of dim 0 of the members' sum, without autograd. Collective."""
    parts = list(value.contiguous().chunk(group.size))
    output = torch.empty_like(parts[group.index])
    group.reduce_scatter(output, parts).wait()
    return output


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor, queue: WeightGradientQueue, group: Communicator
    ) -> Tensor:
        ctx.save_for_backward(value, weight)
        ctx.queue, ctx.parameter, ctx.group = queue, weight, group
        return F.linear(gather_rows(value, group), weight)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        value, weight = ctx.saved_tensors
        grad_value = sum_scatter_rows(grad_output @ weight, ctx.group)
        gathered = gather_rows(value, ctx.group)
        grad_weight = _weight_gradient(ctx, weight, ctx.queue, grad_output, gathered)
        return grad_value, grad_weight, None, None
