"""Grouped-query attention (Ainslie et al. 2023) over the heads of a rank's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.parallel.context_parallel import ContextParallel, Note
from holdfast.parallel.pipeline import MicroBatchContext, TokensKey, WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    Weight,
    column_linear,
    in_slice,
    of_parts,
    row_linear,
)
from holdfast.trainer.models.decoder.norms import Choice, Queues, Region, biased
from holdfast.trainer.models.decoder.regions import (
    HeadNorms,
    RotaryTables,
    attend,
    attend_sliced,
    attend_within,
    heads_of,
    note_logits,
)
from holdfast.trainer.models.decoder.section import DecoderConfig, Design, is_windowed
from holdfast.trainer.models.decoder.table import shares_heads


@dataclass(frozen=True, slots=True)
class AttentionCore:
    """Attention between the projections of one part."""

    rotary: RotaryTables
    split: ContextParallel
    heads: tuple[int, int]
    """The query heads, and the key and value heads."""
    attend: Region
    recomputes: bool
    window: int
    """The keys that a query sees, itself included; 0: all before it."""
    layer: int
    """The layer of the plan."""
    parts: Sequence[int]
    """The rank's parts."""

    def mixed(
        self,
        part: int,
        projected: Sequence[Tensor],
        norms: Sequence[HeadNorms],
        context: MicroBatchContext,
    ) -> list[Tensor]:
        """Attention of each own slice, of one of the rank's parts.

        Args:
            norms: of each slice.
        """
        eps, *tensors = norms[0].eps, *projected
        for of_slice in norms:
            if of_slice.query is not None and of_slice.key is not None:
                tensors += [of_slice.query, of_slice.key]
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(
                self._mixed,
                part,
                context,
                eps,
                *tensors,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return self._mixed(part, context, eps, *tensors)

    def _mixed(
        self, part: int, context: MicroBatchContext, eps: float, *tensors: Tensor
    ) -> list[Tensor]:
        """The same; tensors are arguments by themselves, so that they may be offloaded."""
        count = len(context.slices.own)
        projected, weights = tensors[:count], tensors[count:]
        norms = [
            HeadNorms(*weights[2 * place : 2 * place + 2], eps=eps) if weights else HeadNorms()
            for place in range(count)
        ]
        documents = None if context.batch is None else context.batch.documents
        length = projected[0].shape[0]
        slices, note = replace(context.slices, length=length), self._note(part, context)
        window = self.window if is_windowed(self.window, length * slices.count) else 0
        if slices.count > 1 or window:
            return attend_sliced(
                projected,
                self.rotary,
                self.split,
                slices,
                documents,
                *self.heads,
                norms,
                window,
                context.kept,
                (id(self), part),
                note,
            )
        (whole,) = projected
        if note is not None:
            note_logits(whole, self.rotary, slices, documents, *self.heads, norms[0], note)
        if documents is not None:  # of another number and other lengths in every batch
            return [attend_within(whole, self.rotary, documents, *self.heads, norms[0])]
        return [self.attend(whole, *self.rotary, *self.heads, *(norms[0] if weights else ()))]

    def _note(self, part: int, context: MicroBatchContext) -> Note | None:
        """Where the largest logits of a part's heads are noted; None: they are not asked for.

        What is computed again is noted once.
        """
        logits = context.logits
        if logits is None:
            return None

        def note(number: int, largest: Callable[[], Tensor]) -> None:
            key = TokensKey(self.layer, self.parts[part], context.micro_batch, number)
            if key not in logits:
                logits[key] = largest()

        return note


class Attention(nn.Module):
    """Grouped-query attention over the heads of this rank's parts."""

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        core: AttentionCore,
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._core, self._design = tp, queue, core, design
        self._eps = model.norm_eps
        heads, kv_heads = core.heads
        dim, hidden, own = model.dim_per_head, model.hidden, tp.own_parts
        self._sharing = sharing_parts(model, tp)
        """The parts of this rank that have each key and value head in common; 0: none, whatever
        ranks have the parts."""
        times = self._sharing or 1
        shared = len(own) // times
        sizes = {"qkv": (len(own), (heads + 2 * kv_heads) * dim)}
        if self._sharing or design.inputs_first:
            one = (shared, kv_heads * dim)
            sizes = {"query": (len(own), heads * dim), "key": one, "value": one}
        self._names = list(sizes)
        for name, (count, rows) in sizes.items():
            setattr(self, name, stack_of_parts(count, *design.shape(rows, hidden)))
            if design.qkv_bias:
                setattr(self, f"{name}_bias", stack_of_parts(count, rows))
        self.output = stack_of_parts(len(own), *design.shape(hidden, heads * dim))
        self.output_bias = nn.Parameter(torch.empty(hidden)) if design.output_bias else None
        self.query_norm = nn.Parameter(torch.ones(dim)) if design.head_norms else None
        self.key_norm = nn.Parameter(torch.ones(dim)) if design.head_norms else None

    def forward(
        self, values: Sequence[Tensor], context: MicroBatchContext, queues: Sequence[Queues]
    ) -> list[Tensor]:
        """The attention of each own slice.

        Args:
            queues: of each slice, for the bias of the output.
        """
        own = context.slices.own
        projected = [
            self._projected(value, number) for number, value in zip(own, values, strict=True)
        ]
        mixed = [
            self._core.mixed(part, of_part, self._norms(part, own), context)
            for part, of_part in enumerate(zip(*projected, strict=True))
        ]
        return [
            biased(
                row_linear(of_slice, self._of_parts(self.output, self._queue.of(number)), self._tp),
                self.output_bias,
                by_part,
            )
            for number, of_slice, by_part in zip(own, zip(*mixed, strict=True), queues, strict=True)
        ]

    def _projected(self, value: Tensor, number: int) -> list[Tensor]:
        """The queries, keys and values of slice `number`, of each own part."""
        found = column_linear(value, self._weights(number), self._tp)
        if not self._design.qkv_bias:
            return found
        biases = [
            torch.cat([in_slice(weight.parameter, weight.queue) for weight in of_part])
            for of_part in self._weights(number, "_bias")
        ]
        return [part + bias for part, bias in zip(found, biases, strict=True)]

    def _weights(self, number: int, kind: str = "") -> list[list[Weight]]:
        """The weights of slice `number`, of each own part: of queries, keys and values, or one."""
        times, queue = self._sharing or 1, self._queue.of(number)
        if len(self._names) == 1:
            return [[weight] for weight in of_parts(getattr(self, f"qkv{kind}"), queue)]
        query, key, value = (getattr(self, f"{name}{kind}") for name in self._names)
        found = []
        for place, weight in enumerate(query):
            # Each part's share of a gradient that parts have in common is added by itself.
            shared = self._queue.of(number * times + place % times)
            both = (key[place // times], value[place // times])
            found.append([*self._of_parts((weight,), queue), *self._of_parts(both, shared)])
        return found

    def _of_parts(
        self, parameters: Iterable[nn.Parameter], queue: WeightGradientQueue
    ) -> list[Weight]:
        return of_parts(parameters, queue, inputs_first=self._design.inputs_first)

    def _norms(self, part: int, own: Sequence[int]) -> list[HeadNorms]:
        """The norms of a part's heads, in each slice: each part and slice has a gradient."""
        if self.query_norm is None or self.key_norm is None:
            return [HeadNorms()] * len(own)
        parts = len(self._tp.own_parts)
        queues = [self._queue.of(number * parts + part) for number in own]
        return [
            HeadNorms(in_slice(self.query_norm, q), in_slice(self.key_norm, q), self._eps)
            for q in queues
        ]


def attention_core(
    model: DecoderConfig,
    layer: int,
    window: int,
    tp: TensorParallel,
    rotary: RotaryTables,
    split: ContextParallel,
    choose: Choice,
    *,
    recomputes: bool,
) -> AttentionCore:
    """The core of a layer's attention, for the heads of one part.

    Args:
        layer: that of the plan.
    """
    heads, parts = heads_of(model, tp.parts), tp.own_parts
    return AttentionCore(rotary, split, heads, choose(attend), recomputes, window, layer, parts)


def sharing_parts(model: DecoderConfig, tp: TensorParallel) -> int:
    """The parts of a rank that have each key and value head in common.

    0 where no parts have: their projections are one matrix. It is one, too, where each rank has a
    copy for its only part, and sums do not go by parts.
    """
    if not shares_heads(model, tp.parts, tp.shards > 1):
        return 0
    return min(tp.parts // model.kv_heads, len(tp.own_parts))


def stack_of_parts(parts: int, *shape: int) -> nn.ParameterList:
    """A parameter for each of a rank's parts."""
    return nn.ParameterList(torch.empty(*shape) for _ in range(parts))
