"""The Llama family's modules, for the parts of the layers that one tensor-parallel rank has.

The architecture is Touvron et al. 2023: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et
al. 2021, in Hugging Face's half-rotation form), grouped-query attention (Ainslie et al. 2023),
SwiGLU (Shazeer 2020). Hidden states are float[seq, micro_batch, hidden], or [seq / T, ...] with
sequence parallelism; modules of layers take and give those of the rank's slices, one by one.
Exact-mode safe: a layer's arithmetic depends neither on its chunk nor on the other slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    Weight,
    chunked_cross_entropy_sum,
    column_linear,
    cross_entropy_sum,
    embed,
    in_slice,
    of_parts,
    row_linear,
    sum_partials,
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
from holdfast.trainer.models.llama.table import shares_heads
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

    def forward(self, value: Tensor, queues: Sequence[WeightGradientQueue] = ()) -> Tensor:
        """The value, normed.

        Args:
            queues: the queues of the runs of its tokens that have a gradient each, of equal
                length; none: autograd has the gradient.
        """
        if not queues:
            return self._norm(value, self.weight, self.eps)
        # Also of one run, autograd adds the gradients of a run before those of other uses.
        normed = [
            self._norm(tokens, in_slice(self.weight, queue), self.eps)
            for tokens, queue in zip(value.chunk(len(queues)), queues, strict=True)
        ]
        return normed[0] if len(normed) == 1 else torch.cat(normed)


@dataclass(frozen=True, slots=True)
class _AttentionCore:
    """Attention between the projections of one part."""

    rotary: RotaryTables
    split: ContextParallel
    heads: tuple[int, int]
    """The query heads, and the key and value heads."""
    attend: _Region
    recomputes: bool

    def mixed(
        self, part: int, projected: Sequence[Tensor], context: MicroBatchContext
    ) -> list[Tensor]:
        """Attention of each own slice, of one of the rank's parts."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(
                self._mixed,
                part,
                context,
                *projected,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return self._mixed(part, context, *projected)

    def _mixed(self, part: int, context: MicroBatchContext, *projected: Tensor) -> list[Tensor]:
        """The same; tensors are arguments by themselves, so that they may be offloaded."""
        documents = None if context.batch is None else context.batch.documents
        if context.slices.count > 1:
            return attend_sliced(
                projected,
                self.rotary,
                self.split,
                context.slices,
                documents,
                *self.heads,
                context.kept,
                (id(self), part),
            )
        (whole,) = projected
        if documents is not None:  # of another number and other lengths in every batch
            return [attend_within(whole, self.rotary, documents, *self.heads)]
        return [self.attend(whole, *self.rotary, *self.heads)]


class Attention(nn.Module):
    """Grouped-query attention over the heads of this rank's parts."""

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
        self._tp, self._queue = tp, queue
        heads, kv_heads = heads_of(model, tp.parts)
        self._core = _AttentionCore(
            rotary, context, (heads, kv_heads), choose(attend), recompute_core
        )
        dim, hidden, own = model.dim_per_head, model.hidden, tp.own_parts
        self._sharing = sharing_parts(model, tp)
        """The parts of this rank that have each key and value head in common; 0: none, whatever
        ranks have the parts."""
        if not self._sharing:
            self.qkv = _stack(len(own), (heads + 2 * kv_heads) * dim, hidden)
        else:
            self.query = _stack(len(own), heads * dim, hidden)
            self.key = _stack(len(own) // self._sharing, dim, hidden)
            self.value = _stack(len(own) // self._sharing, dim, hidden)
        self.output = _stack(len(own), hidden, heads * dim)

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        own, queue = context.slices.own, self._queue
        projected = [
            column_linear(value, self._projections(number), self._tp)
            for number, value in zip(own, values, strict=True)
        ]
        mixed = [
            self._core.mixed(part, of_part, context)
            for part, of_part in enumerate(zip(*projected, strict=True))
        ]
        return [
            row_linear(of_slice, of_parts(self.output, queue.of(number)), self._tp)
            for number, of_slice in zip(own, zip(*mixed, strict=True), strict=True)
        ]

    def _projections(self, number: int) -> list[list[Weight]]:
        """The weights of slice `number`, of each own part."""
        times = self._sharing
        if not times:
            queue = self._queue.of(number)
            return [[weight] for weight in of_parts(self.qkv, queue)]
        found = []
        for place, query in enumerate(self.query):
            # Each part's share of a gradient that parts have in common is added by itself.
            shared = self._queue.of(number * times + place % times)
            both = (self.key[place // times], self.value[place // times])
            found.append([Weight(query, self._queue.of(number)), *of_parts(both, shared)])
        return found


class MLP(nn.Module):
    """SwiGLU over the intermediate features of this rank's parts."""

    def __init__(
        self, model: ModelConfig, tp: TensorParallel, queue: WeightGradientQueue, choose: Choice
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._gate = tp, queue, choose(gate)
        sizes = [len(range(*even_range(model.intermediate, tp.parts, k))) for k in tp.own_parts]
        self.gate_up = nn.ParameterList(torch.empty(2 * size, model.hidden) for size in sizes)
        self.down = nn.ParameterList(torch.empty(model.hidden, size) for size in sizes)

    def forward(self, value: Tensor, number: int = 0) -> Tensor:
        """Of slice `number`."""
        queue = self._queue.of(number)
        weights = [[weight] for weight in of_parts(self.gate_up, queue)]
        gated = [self._gate(part) for part in column_linear(value, weights, self._tp)]
        return row_linear(gated, of_parts(self.down, queue), self._tp)


class _Vocabulary(nn.ParameterList):
    """The rows of the vocabulary that this rank's parts have."""

    def __init__(self, model: ModelConfig, tp: TensorParallel) -> None:
        ranges = [even_range(model.vocab, tp.parts, part) for part in tp.own_parts]
        super().__init__(torch.empty(stop - start, model.hidden) for start, stop in ranges)
        self.first_rows = [start for start, _ in ranges]


class Embedding(nn.Module):
    """Token embedding; its output is the first hidden state."""

    def __init__(
        self, model: ModelConfig, tp: TensorParallel, queue: WeightGradientQueue, seed: int
    ) -> None:
        super().__init__()
        self._tp, self._queue = tp, queue
        self.weight = _Vocabulary(model, tp)
        self.dropout = KeyedDropout(model.dropout, seed, "embedding", "output", tp)

    def forward(self, values: None, context: MicroBatchContext) -> list[Tensor]:
        return [self._embedded(context, number) for number in context.slices.own]

    def _embedded(self, context: MicroBatchContext, number: int) -> Tensor:
        assert context.batch is not None
        tokens, queue = context.batch.tokens.t()[context.slices.tokens(number)], self._queue
        found = embed(tokens, list(self.weight), queue.of(number), self.weight.first_rows)
        return self.dropout(sum_partials(found, self._tp), context, number)


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
        self._recompute, self._queue, self._tp = recompute == "full", queue, tp
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
        """The layer; tensors are arguments by themselves, so that they may be offloaded."""
        queues = part_queues(self._queue, context, self._tp)
        normed = map(self.attention_norm, values, queues)
        mixed = self.attention(list(normed), context)
        found = []
        for number, value, added, by_part in zip(
            context.slices.own, values, mixed, queues, strict=True
        ):
            value = value + self.attention_dropout(added, context, number)
            added = self.mlp(self.mlp_norm(value, by_part), number)
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
        self.norm = RMSNorm(model.hidden, model.norm_eps, choose)
        self.projection = _Vocabulary(model, tp)

    def logits(
        self, value: Tensor, number: int = 0, queues: Sequence[WeightGradientQueue] = ()
    ) -> list[Tensor]:
        """The scores of each own part of the vocabulary: float[seq, batch, rows]. Collective.

        Args:
            number: the slice.
            queues: as for the norm.
        """
        weights = [[weight] for weight in of_parts(self.projection, self._queue.of(number))]
        return column_linear(self.norm(value, queues), weights, self._tp)

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        queues = part_queues(self._queue, context, self._tp)
        return [
            self._loss(value, context, number, by_part)
            for number, value, by_part in zip(context.slices.own, values, queues, strict=True)
        ]

    def _loss(
        self,
        value: Tensor,
        context: MicroBatchContext,
        number: int,
        queues: Sequence[WeightGradientQueue],
    ) -> Tensor:
        """The sum of the token losses of one slice."""
        assert context.batch is not None
        targets = context.batch.targets.t()[context.slices.tokens(number)]
        ignored = None if context.batch.documents is None else targets < 0
        first_rows = self.projection.first_rows
        if self._vocab_chunk:
            return chunked_cross_entropy_sum(
                self.norm(value, queues),
                list(self.projection),
                self._queue.of(number),
                targets,
                first_rows,
                self._tp,
                self._vocab_chunk,
                ignored,
            )
        logits = self.logits(value, number, queues)
        return cross_entropy_sum(logits, targets, first_rows, self._tp, ignored)


def sharing_parts(model: ModelConfig, tp: TensorParallel) -> int:
    """The parts of a rank that have each key and value head in common.

    0 where no parts have: their projections are one matrix. It is one, too, where each rank has a
    copy for its only part, and sums do not go by parts.
    """
    if not shares_heads(model, tp.parts, tp.shards > 1):
        return 0
    return min(tp.parts // model.kv_heads, len(tp.own_parts))


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


def _stack(parts: int, rows: int, columns: int) -> nn.ParameterList:
    return nn.ParameterList(torch.empty(rows, columns) for _ in range(parts))


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
