"""The runner of one model chunk under autograd: the only place that calls backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from holdfast.parallel.pipeline.model_chunk import (
    Chunk,
    MicroBatchContext,
    Passage,
    WeightGradientRecord,
)

Watch = Callable[[Passage, Tensor, bool], None]
"""Takes a passage, and what a chunk gives: its output (True) or its input's gradient (False)."""


def _not_watched(passage: Passage, value: Tensor, forward: bool, /) -> None:
    """Nothing looks at what a chunk gives."""


@dataclass(slots=True)
class _InputGradient:
    """The gradient of a chunk's input, set by a backward pass."""

    value: Tensor | None = None


class _ChunkInput(torch.autograd.Function):
    """The beginning of a chunk's graph, which does not keep the input in memory.

    A leaf that requires a gradient would be held by its graph and by its `grad`.
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, value: list[Tensor], gradient: _InputGradient) -> Tensor:
        """The input, taken out of the list `value`.

        Args:
            root: an empty tensor that requires a gradient, so that the output does.
        """
        ctx.gradient = gradient
        return value.pop()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        ctx.gradient.value = grad_output.contiguous()
        return None, None, None


class ModelChunkRunner:
    """Runs a chunk's forward and backward passes, and keeps the state between them. Local.

    It keeps only the graph edge of an output, so the output is freed once it was sent. Of an input
    it keeps only the place of its gradient, so the input may wait elsewhere for the backward pass.
    Exact-mode safe.
    """

    def __init__(
        self,
        chunk: Chunk,
        *,
        is_last: bool,
        context: Callable[[Passage], MicroBatchContext],
        before_gradients: Callable[[int], None] = lambda micro_batch: None,
        watch: Watch = _not_watched,
    ) -> None:
        """Local.

        Args:
            context: returns a passage's context in the running step.
            before_gradients: called with the micro-batch before gradients of it are computed.
            watch: called with what the chunk gives.
        """
        self.chunk = chunk
        self._is_last = is_last
        self._context = context
        device = next(chunk.parameters()).device
        self._before_gradients, self._watch = before_gradients, watch
        self._loss_gradient = torch.ones((), dtype=torch.float64, device=device)
        self._root = torch.empty(0, device=device, requires_grad=True)
        self._gradients: dict[Passage, _InputGradient] = {}
        self._edges: dict[Passage, GradientEdge] = {}
        self._deferred: dict[Passage, list[WeightGradientRecord]] = {}
        self._nothing: dict[Passage, Tensor] = {}
        """The output's gradient of passages in which this rank hosts experts only: it is empty."""
        self.losses: dict[Passage, Tensor] = {}
        """Last chunk: the sum of token losses of what has passed it, a float64 scalar or one for
        each slice, or several for each."""

    def forward(self, passage: Passage, value: Tensor | None) -> Tensor | None:
        context = self._context(passage)
        gradient = _InputGradient()
        if context.hosts_only:
            self._host(passage, context, gradient)
            return None
        if value is not None and context.training:
            value = _ChunkInput.apply(self._root, [value.detach()], gradient)
        with torch.set_grad_enabled(context.training):
            output = self.chunk(value, context)
        if context.training:
            self._gradients[passage] = gradient
            self._edges[passage] = get_gradient_edge(output)
        self._watch(passage, output, True)
        if self._is_last:
            self._loss_gradient.fill_(context.loss_gradient)
            self.losses[passage] = output.detach()
            return None
        return output.detach()

    def _host(self, passage: Passage, context: MicroBatchContext, gradient: _InputGradient) -> None:
        value = self.chunk.no_tokens()
        with torch.set_grad_enabled(context.training):
            if context.training:
                value = _ChunkInput.apply(self._root, [value], gradient)
            output = self.chunk.host(value, context)
        if context.training:
            self._gradients[passage] = gradient
            self._edges[passage] = get_gradient_edge(output)
            self._nothing[passage] = torch.zeros_like(output)

    def clear(self) -> None:
        """Remove the remains of an interrupted step; also called before a new step."""
        of_passages = (self._gradients, self._edges, self._deferred, self._nothing, self.losses)
        for kept in of_passages:
            kept.clear()

    def backward_input(self, passage: Passage, grad_output: Tensor | None) -> Tensor | None:
        with self.chunk.queue.deferred() as kept:
            gradient = self.backward(passage, grad_output)
        self._deferred[passage] = kept
        return gradient

    def backward_weight(self, passage: Passage) -> None:
        self._before_gradients(passage.micro_batch)
        self.chunk.queue.run(self._deferred.pop(passage))

    def backward(self, passage: Passage, grad_output: Tensor | None) -> Tensor | None:
        self._before_gradients(passage.micro_batch)
        gradient = self._gradients.pop(passage)
        edge = self._edges.pop(passage)
        if grad_output is None:
            grad_output = self._nothing.pop(passage, None)
        if grad_output is None:
            grad_output = self._loss_gradient.expand(self.losses[passage].shape)
        torch.autograd.backward(edge, grad_output)
        if gradient.value is not None:
            self._watch(passage, gradient.value, False)
        return gradient.value
