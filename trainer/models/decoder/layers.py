"""The layers of a decoder, for the parts of the layers that one tensor-parallel rank has.

The architecture is Touvron et al. 2023: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et
al. 2021), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020), with what a
family's `Design` adds. Hidden states are float[seq, micro_batch, hidden], or [seq / T, ...] with
sequence parallelism; modules of layers take and give those of the rank's slices, one by one.
Exact-mode safe: a layer's arithmetic depends neither on its chunk nor on the other slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.parallel.context_parallel import ContextParallel
from holdfast.parallel.layout import LayerSpec, even_range
from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    column_linear,
    in_slice,
    of_parts,
    row_linear,
)
from holdfast.trainer.models.compilation import compiled
from holdfast.trainer.models.decoder.attention import Attention, attention_core
from holdfast.trainer.models.decoder.ends import Embedding, Head
from holdfast.trainer.models.decoder.experts import Decisions, Experts
from holdfast.trainer.models.decoder.latent_attention import LatentAttention
from holdfast.trainer.models.decoder.multi_token import MultiTokenLayer
from holdfast.trainer.models.decoder.norms import (
    Choice,
    KeyedDropout,
    Queues,
    Region,
    biased,
    hidden_norm,
    part_queues,
)
from holdfast.trainer.models.decoder.regions import gate, gelu
from holdfast.trainer.models.decoder.rotary import tables_of
from holdfast.trainer.models.decoder.section import DecoderConfig, Design
from holdfast.trainer.models.family import ChunkContext


class MLP(nn.Module):
    """SwiGLU over the intermediate features of this rank's parts."""

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        choose: Choice,
        width: int = 0,
    ) -> None:
        """Local.

        Args:
            width: the intermediate features; 0: those of the model.
        """
        super().__init__()
        self._tp, self._queue, self._gate = tp, queue, choose(gate)
        width = width or model.intermediate
        sizes = [len(range(*even_range(width, tp.parts, part))) for part in tp.own_parts]
        self.gate_up = nn.ParameterList(torch.empty(2 * size, model.hidden) for size in sizes)
        self.down = nn.ParameterList(torch.empty(model.hidden, size) for size in sizes)
        self.gate_up_bias, self.down_bias = None, None
        if design.mlp_bias:
            self.gate_up_bias = nn.ParameterList(torch.empty(2 * size) for size in sizes)
            self.down_bias = nn.Parameter(torch.empty(model.hidden))

    def forward(
        self,
        values: Sequence[Tensor],
        context: MicroBatchContext,
        queues: Sequence[Queues],
        decisions: Decisions,
    ) -> list[Tensor]:
        """Of the slices of a passage.

        Args:
            queues: for the bias of the output.
        """
        return list(map(self._of_slice, values, map(self._queue.of, context.slices.own), queues))

    def _of_slice(self, value: Tensor, queue: WeightGradientQueue, queues: Queues) -> Tensor:
        weights = [[weight] for weight in of_parts(self.gate_up, queue)]
        wide = column_linear(value, weights, self._tp)
        if self.gate_up_bias is not None:
            wide = [
                part + in_slice(bias, queue)
                for part, bias in zip(wide, self.gate_up_bias, strict=True)
            ]
        gated = [self._gate(part) for part in wide]
        return biased(
            row_linear(gated, of_parts(self.down, queue), self._tp), self.down_bias, queues
        )


class PlainMLP(nn.Module):
    """GELU between two projections with biases, over the features of this rank's parts."""

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        choose: Choice,
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._gelu = tp, queue, choose(gelu)
        self._approximate, self._inputs_first = design.gelu, design.inputs_first
        sizes = [len(range(*even_range(model.intermediate, tp.parts, k))) for k in tp.own_parts]
        hidden = model.hidden
        self.up = nn.ParameterList(torch.empty(design.shape(size, hidden)) for size in sizes)
        self.down = nn.ParameterList(torch.empty(design.shape(hidden, size)) for size in sizes)
        self.up_bias = nn.ParameterList(torch.empty(size) for size in sizes)
        self.down_bias = nn.Parameter(torch.empty(hidden))

    def forward(
        self,
        values: Sequence[Tensor],
        context: MicroBatchContext,
        queues: Sequence[Queues],
        decisions: Decisions,
    ) -> list[Tensor]:
        """Of the slices of a passage.

        Args:
            queues: for the bias of the output.
        """
        return list(map(self._of_slice, values, map(self._queue.of, context.slices.own), queues))

    def _of_slice(self, value: Tensor, queue: WeightGradientQueue, queues: Queues) -> Tensor:
        up, down = (
            of_parts(weights, queue, inputs_first=self._inputs_first)
            for weights in (self.up, self.down)
        )
        wide = column_linear(value, [[weight] for weight in up], self._tp)
        found = [
            self._gelu(part + in_slice(bias, queue), self._approximate)
            for part, bias in zip(wide, self.up_bias, strict=True)
        ]
        return biased(row_linear(found, down, self._tp), self.down_bias, queues)


class TransformerLayer(nn.Module):
    """One transformer layer: attention and MLP, each normed before and added after."""

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        layer: int,
        recompute: str,
        context: ChunkContext,
        attention: nn.Module,
        mlp: nn.Module,
        choose: Choice,
    ) -> None:
        super().__init__()
        tp, seed = context.tensor_parallel, context.seed
        self._recompute, self._queue, self._tp = recompute == "full", context.queue, tp
        self.attention_norm = hidden_norm(model, design, choose)
        self.attention = attention
        self.attention_dropout = KeyedDropout(model.dropout, seed, str(layer), "attention", tp)
        self.mlp_norm = hidden_norm(model, design, choose)
        self.mlp = mlp
        self.mlp_dropout = KeyedDropout(model.dropout, seed, str(layer), "mlp", tp)

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        decisions: Decisions = {}
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(
                self._compute,
                context,
                decisions,
                *values,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return self._compute(context, decisions, *values)

    def _compute(
        self, context: MicroBatchContext, decisions: Decisions, *values: Tensor
    ) -> list[Tensor]:
        """The layer; tensors are arguments by themselves, so that they may be offloaded.

        Args:
            decisions: what experts' routers have chosen, when it is computed again.
        """
        queues = part_queues(self._queue, context, self._tp)
        numbers = context.slices.own
        mixed = self.attention(list(map(self.attention_norm, values, queues)), context, queues)
        attended = [
            value + self.attention_dropout(added, context, number)
            for number, value, added in zip(numbers, values, mixed, strict=True)
        ]
        mixed = self.mlp(list(map(self.mlp_norm, attended, queues)), context, queues, decisions)
        return [
            value + self.mlp_dropout(added, context, number)
            for number, value, added in zip(numbers, attended, mixed, strict=True)
        ]

    def host(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        """Have the layer's experts work for the tokens of others: float[0, hidden]. Collective."""
        if not isinstance(self.mlp, Experts):
            return value

        def hosted(value: Tensor) -> Tensor:
            return self.mlp([value], context, (), {})[0]

        if self._recompute and torch.is_grad_enabled():
            return checkpoint(hosted, value, use_reentrant=False, preserve_rng_state=False)
        return hosted(value)


def _as_it_is(region: Region) -> Region:
    return region


def module_builder(
    model: DecoderConfig, design: Design, context: ChunkContext
) -> Callable[[int, LayerSpec], nn.Module]:
    """The builder of a chunk's modules, which share rotary tables; see `Family.modules`. Local."""
    tp, queue = context.tensor_parallel, context.queue
    rotary = tables_of(model, design, context.seq_len, context.dtype, context.device)
    choose = compiled if context.compiles else _as_it_is
    split = context.context_parallel or ContextParallel(None, "heads")

    latent = design.latent

    def build(layer: int, spec: LayerSpec) -> nn.Module:
        if layer == 0:
            return Embedding(model, design, tp, queue, context.seed)
        if layer == model.layers + 1:
            further = None if design.multi_token is None else multi_token_layer(spec)
            return Head(model, design, tp, queue, spec.vocab_chunk, choose, further)
        return transformer_layer(layer, spec)

    def multi_token_layer(spec: LayerSpec) -> MultiTokenLayer:
        return MultiTokenLayer(
            model.hidden,
            tp,
            queue,
            Embedding(model, design, tp, queue, context.seed, "further embedding"),
            transformer_layer(model.layers + 1, spec),
            [hidden_norm(model, design, choose) for _ in range(3)],
        )

    def transformer_layer(layer: int, spec: LayerSpec) -> TransformerLayer:
        recompute, number = spec.recompute, layer - 1
        core = attention_core(
            model,
            layer,
            design.window(number),
            tp,
            rotary,
            split,
            choose,
            recomputes=recompute == "selective",
        )
        if latent is None:
            attention: nn.Module = Attention(model, design, tp, queue, core)
        else:
            attention = LatentAttention(model, latent, tp, queue, core, choose)
        if (experts := design.experts_of(number)) is None:
            kind = PlainMLP if design.gelu else MLP
            mlp: nn.Module = kind(model, design, tp, queue, choose)
        else:
            shared = None
            if experts.shared:
                shared = MLP(model, design, tp, queue, choose, experts.shared)
            mlp = Experts(model, experts, layer, tp, queue, context.experts_of(layer), shared)
        return TransformerLayer(model, design, number, recompute, context, attention, mlp, choose)

    return build
