"""Linear layers with a queue for weight gradients, so that a backward pass can be split.

The backward pass of each layer computes only the input's gradient, and hands the weight's to the
chunk's `WeightGradientQueue`, exactly once. Exact-mode safe: the matrix products are the same in
every schedule, and those of a part of a layer are the same whatever ranks have the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.pipeline import WeightGradientQueue
from holdfast.parallel.tensor_parallel.split import TensorParallel
from holdfast.parallel.tensor_parallel.strips import Rows
from holdfast.parallel.tensor_parallel.sums import sum_in_order


class Weight(NamedTuple):
    """A weight, and the queue of its gradients."""

    parameter: nn.Parameter
    queue: WeightGradientQueue
    inputs_first: bool = False
    """Whether it is float[in, out], and not float[out, in]."""

    def rows_by_inputs(self, values: Tensor) -> Tensor:
        """The weight's values, or its gradient, as float[out, in]: a view."""
        return values.t() if self.inputs_first else values


def of_parts(
    parameters: Iterable[nn.Parameter], queue: WeightGradientQueue, *, inputs_first: bool = False
) -> list[Weight]:
    """The weights of own parts that have their gradients in one queue."""
    return [Weight(parameter, queue, inputs_first) for parameter in parameters]


def column_linear(
    value: Tensor, weights: Sequence[Sequence[Weight]], tp: TensorParallel
) -> list[Tensor]:
    """A layer with split output features; every rank then has the whole sequence.

    With sequence parallelism it gathers the sequence, forward and again backward, so that only the
    shard is kept (Korthikanti et al. 2022, section 4.2.2). Collective over the group of `tp`.

    Args:
        value: a hidden state, float[..., in].
        weights: of each own part, the weights whose output features follow one another, float[out,
            in] each, or as they say.
    Returns:
        Of each own part, float[..., out].
    """
    return list(_ColumnLinear.apply(value, tp, weights, *_parameters(weights)))


def row_linear(values: Sequence[Tensor], weights: Sequence[Weight], tp: TensorParallel) -> Tensor:
    """A layer with split input features; the parts' partial outputs are summed.

    Collective over the group of `tp`.

    Args:
        values: of each own part, for the whole sequence, float[..., in].
        weights: of each own part, float[out, in], or as they say.
    Returns:
        A hidden state, float[..., out].
    """
    return _RowLinear.apply(  # pyrefly: ignore[bad-return]
        tp, weights, *values, *_parameters([weights])
    )


def sum_partials(partial: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of the ranks' partial hidden states. Collective over the group of `tp`."""
    if tp.group is None:
        return partial
    return _SumPartials.apply(partial, tp)  # pyrefly: ignore[bad-return]


def to_parts(value: Tensor, tp: TensorParallel) -> list[Tensor]:
    """A hidden state of all tokens, for each own part; the parts' gradients are summed.

    Collective over the group of `tp`.
    """
    return list(_ToParts.apply(value, tp))


def in_slice(weight: nn.Parameter, queue: WeightGradientQueue) -> Tensor:
    """The weight for one slice, whose gradient is added by itself. Local.

    Autograd alone would add the gradients of all slices as floats first. Without a sink it does.
    """
    return _InSlice.apply(weight, queue)  # pyrefly: ignore[bad-return]


def _parameters(weights: Sequence[Sequence[Weight]]) -> list[nn.Parameter]:
    return [weight.parameter for of_part in weights for weight in of_part]


def _matrix(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _weight_gradient(
    is_needed: bool, weight: Weight, grad_output: Tensor, value: Tensor
) -> Tensor | None:
    """Hand on the gradient of a weight, or return it where there is no sink."""
    if not is_needed:
        return None
    rows, columns = _matrix(grad_output), _matrix(value)
    if weight.inputs_first:
        rows, columns = columns, rows
    if not weight.queue.has_sink:
        return rows.t() @ columns
    weight.queue.put(weight.parameter, (rows.detach(),), columns)
    return None


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        tp: TensorParallel,
        weights: Sequence[Sequence[Weight]],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(value, *parameters)
        ctx.tp, ctx.weights = tp, weights
        matrices = [
            [weight.rows_by_inputs(weight.parameter).t() for weight in part] for part in weights
        ]
        return _products(tp.arriving(value), matrices)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        value, *parameters = ctx.saved_tensors
        tp, left, needed = ctx.tp, list(parameters), ctx.needs_input_grad[3:]
        arriving = tp.arriving(value) if any(needed) else None
        held = [[weight.rows_by_inputs(left.pop(0)) for weight in part] for part in ctx.weights]
        finish = None
        if ctx.needs_input_grad[0]:
            gradients = list(zip(grad_outputs, held, strict=True))

            def partial(rows: slice) -> list[Tensor]:
                return [_input_gradient(gradient[rows], part) for gradient, part in gradients]

            finish = tp.leaving(partial, grad_outputs[0].shape[0])
        found: list[Tensor | None] = [None] * len(needed)
        if arriving is not None:
            whole = arriving.whole()
            flat = [
                pair
                for part, weights, gradient in zip(ctx.weights, held, grad_outputs, strict=True)
                for pair in zip(part, _cut(gradient, weights), strict=True)
            ]
            found = [
                _weight_gradient(is_needed, weight, gradient, whole)
                for is_needed, (weight, gradient) in zip(needed, flat, strict=True)
            ]
        return finish() if finish is not None else None, None, None, *found


def _products(rows: Rows, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The products of all rows with the matrices of each part, strip by strip.

    Args:
        parts: of each part, float[in, out] whose output features follow one another.
    """
    widths = [[matrix.shape[1] for matrix in part] for part in parts]
    results: list[Tensor] = []
    for where, strip in rows.strips():
        if not results:
            shape = (rows.count, *strip.shape[1:-1])
            results = [strip.new_empty(*shape, sum(of_part)) for of_part in widths]
        flat = _matrix(strip)
        for result, part, of_part in zip(results, parts, widths, strict=True):
            found = result[where].flatten(0, -2).split(of_part, -1)
            for matrix, columns in zip(part, found, strict=True):
                torch.mm(flat, matrix, out=columns)
    return tuple(results)


def _cut(gradient: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient of each weight's output features."""
    if len(weights) == 1:
        return (gradient,)
    return gradient.split([weight.shape[0] for weight in weights], -1)


def _input_gradient(gradient: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """One part's share of the input's gradient."""
    return sum_in_order(
        [cut @ weight for cut, weight in zip(_cut(gradient, weights), weights, strict=True)]
    )


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tp: TensorParallel,
        weights: Sequence[Weight],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.tp, ctx.weights = tp, weights
        matrices = [weight.rows_by_inputs(weight.parameter) for weight in weights]
        pairs = list(zip(tensors[: len(weights)], matrices, strict=True))

        def partial(rows: slice) -> list[Tensor]:
            return [F.linear(value[rows], weight) for value, weight in pairs]

        return tp.leaving(partial, tensors[0].shape[0])()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.weights)
        tensors = ctx.saved_tensors
        values = tensors[:count]
        needed = ctx.needs_input_grad[2:]
        arriving = ctx.tp.arriving(grad_output)
        grad_values: Sequence[Tensor | None] = [None] * count
        if any(needed[:count]):
            held = zip(ctx.weights, tensors[count:], strict=True)
            matrices = [[weight.rows_by_inputs(values)] for weight, values in held]
            grad_values = _products(arriving, matrices)
        whole = arriving.whole()
        gradients = [
            _weight_gradient(is_needed, weight, whole, value)
            for is_needed, weight, value in zip(needed[count:], ctx.weights, values, strict=True)
        ]
        return None, None, *grad_values, *gradients


class _SumPartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.sum([partial.clone(memory_format=torch.contiguous_format)])

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.whole(grad_output), None


class _ToParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, tp: TensorParallel) -> tuple[Tensor, ...]:
        ctx.tp = tp
        whole = tp.whole(value)
        return tuple(whole.view_as(whole) for _ in tp.own_parts)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        own = [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]
        return ctx.tp.sum(own), None


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
