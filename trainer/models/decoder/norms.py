"""Norms, biases, dropout and whole products of hidden states, by runs of tokens that have a
gradient each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from holdfast.parallel.keyed_random import dropout, stream_key
from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import TensorParallel, Weight, column_linear, in_slice
from holdfast.trainer.models.decoder.regions import layer_norm, norm
from holdfast.trainer.models.decoder.section import DecoderConfig, Design

Queues = Sequence[WeightGradientQueue]
"""The queues of the runs of a hidden state's tokens that have a gradient each, of equal length;
none: autograd has the gradient."""
Region = Callable[..., Tensor]
_ALONE: Final = TensorParallel(None, False)
Choice = Callable[[Region], Region]
"""Gives the form in which a region is called: as it is, or compiled."""


def by_runs(
    function: Region, value: Tensor, parameters: Sequence[nn.Parameter], queues: Queues
) -> Tensor:
    """`function(tokens, *parameters)` of all tokens, where each run gives parameters a gradient."""
    if not queues:
        return function(value, *parameters)
    # Also of one run, autograd adds the gradients of a run before those of other uses.
    found = [
        function(tokens, *(in_slice(parameter, queue) for parameter in parameters))
        for tokens, queue in zip(value.chunk(len(queues)), queues, strict=True)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or wider."""

    def __init__(self, elements: int, eps: float, choose: Choice) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(elements))
        self.eps = eps
        self._norm = choose(norm)

    def forward(self, value: Tensor, queues: Queues = ()) -> Tensor:
        """The value, normed."""
        return by_runs(self._of_run, value, [self.weight], queues)

    def _of_run(self, value: Tensor, weight: Tensor) -> Tensor:
        return self._norm(value, weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, in float32 or wider."""

    def __init__(self, elements: int, eps: float, choose: Choice) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(elements))
        self.bias = nn.Parameter(torch.zeros(elements))
        self.eps = eps
        self._norm = choose(layer_norm)

    def forward(self, value: Tensor, queues: Queues = ()) -> Tensor:
        """The value, normed."""
        return by_runs(self._of_run, value, [self.weight, self.bias], queues)

    def _of_run(self, value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._norm(value, weight, bias, self.eps)


def hidden_norm(model: DecoderConfig, design: Design, choose: Choice) -> nn.Module:
    """The norm of hidden states that a model's layers have."""
    kind = LayerNorm if design.layer_norm else RMSNorm
    return kind(model.hidden, model.norm_eps, choose)


def biased(value: Tensor, bias: nn.Parameter | None, queues: Queues) -> Tensor:
    """A hidden state with a bias added; None: there is none."""
    return value if bias is None else by_runs(torch.add, value, [bias], queues)


def joined_linear(
    sources: Sequence[Tensor],
    parameter: nn.Parameter,
    queue: WeightGradientQueue,
    number: int,
    parts: int,
) -> Tensor:
    """The product of a weight that every part has whole with this rank's tokens. Local.

    Args:
        sources: hidden states of slice `number`, whose features are joined.
        parameter: float[out, in].
        parts: the rank's parts; the tokens of each have a gradient of their own.
    """
    found = []
    for place, of_part in enumerate(zip(*(value.chunk(parts) for value in sources), strict=True)):
        weight = Weight(parameter, queue.of(number * parts + place))
        tokens = of_part[0] if len(of_part) == 1 else torch.cat(of_part, -1)
        found += column_linear(tokens, [[weight]], _ALONE)
    return found[0] if parts == 1 else torch.cat(found)


class _Dropout(torch.autograd.Function):
    """Keyed dropout; backward draws the mask again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, key: Any, offset: int, probability: float) -> Tensor:
        ctx.draw = (key, offset, probability)
        return dropout(value, key, offset=offset, probability=probability)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        key, offset, probability = ctx.draw
        return dropout(grad_output, key, offset=offset, probability=probability), None, None, None


class KeyedDropout(nn.Module):
    """Dropout of a hidden state, keyed by (seed, step, micro-batch, layer, site)."""

    def __init__(
        self, probability: float, seed: int, layer: str, site: str, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.probability, self._seed, self._layer, self._site = probability, seed, layer, site
        self._tp = tp

    def forward(self, value: Tensor, context: MicroBatchContext, number: int = 0) -> Tensor:
        """The value of slice `number` with some elements set to zero."""
        if self.probability == 0.0 or not context.training:
            return value
        key = stream_key(
            self._seed, "dropout", context.step, context.micro_batch, self._layer, self._site
        )
        before = number * context.slices.length * value[0].numel()
        return _Dropout.apply(  # pyrefly: ignore[bad-return]
            value, key, before + self._tp.element_offset(value), self.probability
        )


def part_queues(
    queue: WeightGradientQueue, context: MicroBatchContext, tp: TensorParallel
) -> Sequence[Sequence[WeightGradientQueue]]:
    """Of each own slice, the queues of weights that autograd must not sum; none: it may.

    A norm has a gradient for each own part, which is that of as many tokens.
    """
    parts = len(tp.own_parts)
    if context.slices.count == tp.shards == 1:
        return [()]
    return [
        [queue.of(number * parts + place) for place in range(parts)]
        for number in context.slices.own
    ]
