"""The Llama family's modules, for one tensor-parallel rank.

The architecture is Touvron et al. 2023: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et
al. 2021, in Hugging Face's half-rotation form), grouped-query attention (Ainslie et al. 2023),
SwiGLU (Shazeer 2020). Hidden states are float[seq, micro_batch, hidden], or [seq / T, ...] with
sequence parallelism; modules of layers take and give those of the rank's slices, one by one.
Exact-mode safe: a layer's arithmetic depends neither on its chunk nor on the other slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.parallel.context_parallel import ContextParallel
from holdfast.parallel.keyed_random import dropout, stream_key
from holdfast.parallel.layout import LayerSpec, even_range
from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    chunked_cross_entropy_sum,
    cross_entropy_sum,
    embed,
    in_slice,
)
from holdfast.trainer.models.compilation import compiled
from holdfast.trainer.models.family import ChunkContext
from holdfast.trainer.models.llama.regions import (
    RotaryTables,
    attend,
    attend_sliced,
    attend_within,
    gate,
    heads_of,
    norm,
)
from holdfast.trainer.models.section import ModelConfig

_Region = Callable[..., Tensor]
Choice = Callable[[_Region], _Region]
"""Gives the form in which a region is called: as it is, or compiled."""


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


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or wider."""

    def __init__(self, hidden: int, eps: float, choose: Choice) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps
        self._norm = choose(norm)

    def forward(self, value: Tensor, queue: WeightGradientQueue | None = None) -> Tensor:
        """The value, normed.

        Args:
            queue: the queue of its slice if there are several; None: autograd has the gradient.
        """
        weight = self.weight if queue is None else in_slice(self.weight, queue)
        return self._norm(value, weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over this rank's heads."""

    def __init__(
        self,
        model: ModelConfig,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        rotary: RotaryTables,
        recompute_core: bool,
        choose: Choice,
        context: ContextParallel,
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._rotary, self._context = tp, queue, rotary, context
        self._heads = heads_of(model, tp.size)
        self._recompute_core = recompute_core
        self._attend = choose(attend)
        heads, kv_heads = self._heads
        dim = model.dim_per_head
        self.qkv = nn.Parameter(torch.empty((heads + 2 * kv_heads) * dim, model.hidden))
        self.output = nn.Parameter(torch.empty(model.hidden, heads * dim))

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        own, queue = context.slices.own, self._queue
        projected = [
            self._tp.column_linear(value, self.qkv, queue.of(number))
            for number, value in zip(own, values, strict=True)
        ]
        if self._recompute_core and torch.is_grad_enabled():
            mixed = checkpoint(
                self._core, context, *projected, use_reentrant=False, preserve_rng_state=False
            )
        else:
            mixed = self._core(context, *projected)
        return [
            self._tp.row_linear(value, self.output, queue.of(number))
            for number, value in zip(own, mixed, strict=True)
        ]

    def _core(self, context: MicroBatchContext, *projected: Tensor) -> list[Tensor]:
        """Attention of each own slice; tensors by themselves, which may be offloaded."""
        documents = None if context.batch is None else context.batch.documents
        if context.slices.count > 1:
            return attend_sliced(
                projected, self._rotary, self._context, context.slices, documents, *self._heads
            )
        (whole,) = projected
        if documents is not None:  # of another number and other lengths in every batch
            return [attend_within(whole, self._rotary, documents, *self._heads)]
        return [self._attend(whole, *self._rotary, *self._heads)]


class MLP(nn.Module):
    """SwiGLU over this rank's part of the intermediate features."""

    def __init__(
        self, model: ModelConfig, tp: TensorParallel, queue: WeightGradientQueue, choose: Choice
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._gate = tp, queue, choose(gate)
        start, stop = even_range(model.intermediate, tp.size, tp.index)
        self.gate_up = nn.Parameter(torch.empty(2 * (stop - start), model.hidden))
        self.down = nn.Parameter(torch.empty(model.hidden, stop - start))

    def forward(self, value: Tensor, number: int = 0) -> Tensor:
        """Of slice `number`."""
        queue = self._queue.of(number)
        gated = self._gate(self._tp.column_linear(value, self.gate_up, queue))
        return self._tp.row_linear(gated, self.down, queue)


class Embedding(nn.Module):
    """Token embedding; its output is the first hidden state."""

    def __init__(
        self, model: ModelConfig, tp: TensorParallel, queue: WeightGradientQueue, seed: int
    ) -> None:
        super().__init__()
        self._tp, self._queue = tp, queue
        self._first, stop = even_range(model.vocab, tp.size, tp.index)
        self.weight = nn.Parameter(torch.empty(stop - self._first, model.hidden))
        self.dropout = KeyedDropout(model.dropout, seed, "embedding", "output", tp)

    def forward(self, values: None, context: MicroBatchContext) -> list[Tensor]:
        return [self._embedded(context, number) for number in context.slices.own]

    def _embedded(self, context: MicroBatchContext, number: int) -> Tensor:
        assert context.batch is not None
        tokens, queue = context.batch.tokens.t()[context.slices.tokens(number)], self._queue
        found = embed(tokens, self.weight, queue.of(number), self._first)
        return self.dropout(self._tp.sum_partials(found), context, number)


class TransformerLayer(nn.Module):
    """One transformer layer: attention and MLP, each normed before and added after."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        rotary: RotaryTables,
        recompute: str,
        seed: int,
        choose: Choice,
        context: ContextParallel,
    ) -> None:
        super().__init__()
        self._recompute, self._queue = recompute == "full", queue
        self.attention_norm = RMSNorm(model.hidden, model.norm_eps, choose)
        self.attention = Attention(
            model, tp, queue, rotary, recompute == "selective", choose, context
        )
        self.attention_dropout = KeyedDropout(model.dropout, seed, str(layer), "attention", tp)
        self.mlp_norm = RMSNorm(model.hidden, model.norm_eps, choose)
        self.mlp = MLP(model, tp, queue, choose)
        self.mlp_dropout = KeyedDropout(model.dropout, seed, str(layer), "mlp", tp)

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(
                self._compute, context, *values, use_reentrant=False, preserve_rng_state=False
            )
        return self._compute(context, *values)

    def _compute(self, context: MicroBatchContext, *values: Tensor) -> list[Tensor]:
        """All of the layer; tensors by themselves, which may be offloaded."""
        queues = slice_queues(self._queue, context)
        normed = map(self.attention_norm, values, queues)
        mixed = self.attention(list(normed), context)
        found = []
        for number, value, added, queue in zip(
            context.slices.own, values, mixed, queues, strict=True
        ):
            value = value + self.attention_dropout(added, context, number)
            added = self.mlp(self.mlp_norm(value, queue), number)
            found.append(value + self.mlp_dropout(added, context, number))
        return found


class Head(nn.Module):
    """Final norm, projection to the vocabulary, and the sum of token losses."""

    def __init__(
        self,
        model: ModelConfig,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        vocab_chunk: int,
        choose: Choice,
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._vocab_chunk = tp, queue, vocab_chunk
        self._first, stop = even_range(model.vocab, tp.size, tp.index)
        self.norm = RMSNorm(model.hidden, model.norm_eps, choose)
        self.projection = nn.Parameter(torch.empty(stop - self._first, model.hidden))

    def logits(
        self, value: Tensor, number: int = 0, queue: WeightGradientQueue | None = None
    ) -> Tensor:
        """This rank's part of the scores: float[seq, batch, vocab / T]. Collective.

        Args:
            number, queue: the slice, and its queue if there are several.
        """
        normed = self.norm(value, queue)
        return self._tp.column_linear(normed, self.projection, self._queue.of(number))

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        queues = slice_queues(self._queue, context)
        return [
            self._loss(value, context, number, queue)
            for number, value, queue in zip(context.slices.own, values, queues, strict=True)
        ]

    def _loss(
        self,
        value: Tensor,
        context: MicroBatchContext,
        number: int,
        queue: WeightGradientQueue | None,
    ) -> Tensor:
        """The sum of the token losses of one slice."""
        assert context.batch is not None
        targets = context.batch.targets.t()[context.slices.tokens(number)]
        ignored = None if context.batch.documents is None else targets < 0
        if self._vocab_chunk:
            return chunked_cross_entropy_sum(
                self.norm(value, queue),
                self.projection,
                self._queue.of(number),
                targets,
                self._first,
                self._tp,
                self._vocab_chunk,
                ignored,
            )
        logits = self.logits(value, number, queue)
        return cross_entropy_sum(logits, targets, self._first, self._tp.group, ignored)


def slice_queues(
    queue: WeightGradientQueue, context: MicroBatchContext
) -> Sequence[WeightGradientQueue | None]:
    """Of each own slice, the queue of weights that autograd must not sum; None for one slice."""
    if context.slices.count == 1:
        return [None]
    return [queue.of(number) for number in context.slices.own]


def _as_it_is(region: _Region) -> _Region:
    return region


def module_builder(
    model: ModelConfig, context: ChunkContext
) -> Callable[[int, LayerSpec], nn.Module]:
    """The builder of a chunk's modules, which share rotary tables; see `Family.modules`. Local."""
    tp, queue, seed = context.tensor_parallel, context.queue, context.seed
    rotary = RotaryTables.of(model, context.seq_len, context.dtype, context.device)
    choose = compiled if context.compiles else _as_it_is
    split = context.context_parallel or ContextParallel(None, "heads")

    def build(layer: int, spec: LayerSpec) -> nn.Module:
        if layer == 0:
            return Embedding(model, tp, queue, seed)
        if layer == model.layers + 1:
            return Head(model, tp, queue, spec.vocab_chunk, choose)
        recompute, number = spec.recompute, layer - 1
        return TransformerLayer(model, number, tp, queue, rotary, recompute, seed, choose, split)

    return build
