"""The embedding and the head of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.parallel.layout import even_range
from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    chunked_cross_entropy_sum,
    column_linear,
    cross_entropy_sum,
    embed,
    of_parts,
    sum_partials,
)
from holdfast.trainer.models.decoder.norms import Choice, KeyedDropout, hidden_norm, part_queues
from holdfast.trainer.models.decoder.section import DecoderConfig, Design


class _Rows(nn.ParameterList):
    """The rows of a table of vectors, of tokens or of positions, that this rank's parts have."""

    def __init__(self, count: int, hidden: int, tp: TensorParallel) -> None:
        ranges = [even_range(count, tp.parts, part) for part in tp.own_parts]
        super().__init__(torch.empty(stop - start, hidden) for start, stop in ranges)
        self.first_rows = [start for start, _ in ranges]


class Embedding(nn.Module):
    """Token embedding, with that of positions if it is learned: the first hidden state."""

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        seed: int,
    ) -> None:
        super().__init__()
        self._tp, self._queue = tp, queue
        self.weight = _Rows(model.vocab, model.hidden, tp)
        self.positions = None
        if design.learned_positions:
            self.positions = _Rows(model.max_seq_len, model.hidden, tp)
        self.dropout = KeyedDropout(model.dropout, seed, "embedding", "output", tp)

    def forward(self, values: None, context: MicroBatchContext) -> list[Tensor]:
        return [self._embedded(context, number) for number in context.slices.own]

    def _embedded(self, context: MicroBatchContext, number: int) -> Tensor:
        assert context.batch is not None
        tokens, places = context.batch.tokens.t(), context.slices.tokens(number)
        found = self._of(self.weight, tokens[places], number)
        if self.positions is not None:
            documents = context.batch.documents
            if documents is None:
                numbers = torch.arange(len(tokens), device=tokens.device)
                positions = numbers[:, None].expand_as(tokens)
            else:
                positions = documents.positions
            # Parts have the rows of some positions each, as of tokens: zeros are added elsewhere.
            found = found + self._of(self.positions, positions[places], number)
        return self.dropout(sum_partials(found, self._tp), context, number)

    def _of(self, rows: _Rows, which: Tensor, number: int) -> Tensor:
        return embed(which, list(rows), self._queue.of(number), rows.first_rows)


class Head(nn.Module):
    """Final norm, projection to the vocabulary, and the sum of token losses."""

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        vocab_chunk: int,
        choose: Choice,
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._vocab_chunk = tp, queue, vocab_chunk
        self.norm = hidden_norm(model, design, choose)
        self.projection = _Rows(model.vocab, model.hidden, tp)

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
                context.z_loss,
            )
        logits = self.logits(value, number, queues)
        return cross_entropy_sum(logits, targets, first_rows, self._tp, ignored, context.z_loss)
