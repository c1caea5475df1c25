"""The Llama family's modules, for one tensor-parallel rank.

The architecture is Touvron et al. 2023: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et
al. 2021, in Hugging Face's half-rotation form), grouped-query attention (Ainslie et al. 2023),
SwiGLU (Shazeer 2020). Hidden states are float[seq, micro_batch, hidden], or [seq / T, ...] with
sequence parallelism. Exact-mode safe: a layer's arithmetic does not depend on its chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.parallel.keyed_random import dropout, stream_key
from holdfast.parallel.layout import LayerSpec, even_range
from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    chunked_cross_entropy_sum,
    cross_entropy_sum,
    embed,
)
from holdfast.trainer.models.compilation import compiled
from holdfast.trainer.models.family import ChunkContext
from holdfast.trainer.models.llama.regions import (
    RotaryTables,
    attend,
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

    def forward(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        if self.probability == 0.0 or not context.training:
            return value
        key = stream_key(
            self._seed, "dropout", context.step, context.micro_batch, self._layer, self._site
        )
        return _Dropout.apply(  # pyrefly: ignore[bad-return]
            value, key, self._tp.element_offset(value), self.probability
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or wider."""

    def __init__(self, hidden: int, eps: float, choose: Choice) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps
        self._norm = choose(norm)

    def forward(self, value: Tensor) -> Tensor:
        return self._norm(value, self.weight, self.eps)


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
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._rotary = tp, queue, rotary
        self._heads = heads_of(model, tp.size)
        self._recompute_core = recompute_core
        self._attend = choose(attend)
        heads, kv_heads = self._heads
        dim = model.dim_per_head
        self.qkv = nn.Parameter(torch.empty((heads + 2 * kv_heads) * dim, model.hidden))
        self.output = nn.Parameter(torch.empty(model.hidden, heads * dim))

    def forward(self, value: Tensor) -> Tensor:
        projected = self._tp.column_linear(value, self.qkv, self._queue)
        if self._recompute_core and torch.is_grad_enabled():
            mixed = checkpoint(self._core, projected, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._core(projected)
        return self._tp.row_linear(mixed, self.output, self._queue)

    def _core(self, projected: Tensor) -> Tensor:
        return self._attend(projected, *self._rotary, *self._heads)


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

    def forward(self, value: Tensor) -> Tensor:
        gated = self._gate(self._tp.column_linear(value, self.gate_up, self._queue))
        return self._tp.row_linear(gated, self.down, self._queue)


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

    def forward(self, value: None, context: MicroBatchContext) -> Tensor:
        assert context.tokens is not None
        tokens = context.tokens[:, :-1].t()
        embedded = self._tp.sum_partials(embed(tokens, self.weight, self._queue, self._first))
        return self.dropout(embedded, context)


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
    ) -> None:
        super().__init__()
        self._recompute = recompute == "full"
        self.attention_norm = RMSNorm(model.hidden, model.norm_eps, choose)
        self.attention = Attention(model, tp, queue, rotary, recompute == "selective", choose)
        self.attention_dropout = KeyedDropout(model.dropout, seed, str(layer), "attention", tp)
        self.mlp_norm = RMSNorm(model.hidden, model.norm_eps, choose)
        self.mlp = MLP(model, tp, queue, choose)
        self.mlp_dropout = KeyedDropout(model.dropout, seed, str(layer), "mlp", tp)

    def forward(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(
                self._compute, value, context, use_reentrant=False, preserve_rng_state=False
            )
        return self._compute(value, context)

    def _compute(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        mixed = self.attention(self.attention_norm(value))
        value = value + self.attention_dropout(mixed, context)
        return value + self.mlp_dropout(self.mlp(self.mlp_norm(value)), context)


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

    def logits(self, value: Tensor) -> Tensor:
        """This rank's part of the scores: float[seq, batch, vocab / T]. Collective."""
        return self._tp.column_linear(self.norm(value), self.projection, self._queue)

    def forward(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        assert context.tokens is not None
        targets = context.tokens[:, 1:].t()
        if self._vocab_chunk:
            return chunked_cross_entropy_sum(
                self.norm(value),
                self.projection,
                self._queue,
                targets,
                self._first,
                self._tp,
                self._vocab_chunk,
            )
        return cross_entropy_sum(self.logits(value), targets, self._first, self._tp.group)


def _as_it_is(region: _Region) -> _Region:
    return region


def module_builder(
    model: ModelConfig, context: ChunkContext
) -> Callable[[int, LayerSpec], nn.Module]:
    """The builder of a chunk's modules, which share rotary tables; see `Family.modules`. Local."""
    tp, queue, seed = context.tensor_parallel, context.queue, context.seed
    rotary = RotaryTables.of(model, context.seq_len, context.dtype, context.device)
    choose = compiled if context.compiles else _as_it_is

    def build(layer: int, spec: LayerSpec) -> nn.Module:
        if layer == 0:
            return Embedding(model, tp, queue, seed)
        if layer == model.layers + 1:
            return Head(model, tp, queue, spec.vocab_chunk, choose)
        return TransformerLayer(model, layer - 1, tp, queue, rotary, spec.recompute, seed, choose)

    return build
