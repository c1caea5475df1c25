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
from holdfast.trainer.models.decoder.multi_token import MultiTokenLayer
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
        name: str = "embedding",
    ) -> None:
        """Local.

        Args:
            name: that of its dropout.
        """
        super().__init__()
        self._tp, self._queue = tp, queue
        self.weight = _Rows(model.vocab, model.hidden, tp)
        self.positions = None
        if design.learned_positions:
            self.positions = _Rows(model.max_seq_len, model.hidden, tp)
        self.dropout = KeyedDropout(model.dropout, seed, name, "output", tp)

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
    """Final norm, projection to the vocabulary, and the sum of token losses.

    With a layer that predicts a further token, which it is given, in training also the sum of that
    token's losses: float64[2] for each slice. One product makes the logits of both, so that the
    projection has one gradient of a slice.
    """

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        vocab_chunk: int,
        choose: Choice,
        further: MultiTokenLayer | None = None,
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._vocab_chunk = tp, queue, vocab_chunk
        self._further_factor = 0.0 if design.multi_token is None else design.multi_token.loss
        self.norm = hidden_norm(model, design, choose)
        self.projection = _Rows(model.vocab, model.hidden, tp)
        self.further = further

    def logits(self, value: Tensor) -> list[Tensor]:
        """The scores of each own part of the vocabulary: float[seq, batch, rows]. Collective."""
        return self._projected(self.norm(value), 0)

    def _projected(self, normed: Tensor, number: int) -> list[Tensor]:
        weights = [[weight] for weight in of_parts(self.projection, self._queue.of(number))]
        return column_linear(normed, weights, self._tp)

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        queues = part_queues(self._queue, context, self._tp)
        normed, own = list(map(self.norm, values, queues)), context.slices.own
        assert context.batch is not None
        if self.further is None or not context.training:
            return [
                self._loss(value, [context.batch.targets], context, number)
                for number, value in zip(own, normed, strict=True)
            ]
        targets = [context.batch.targets, context.batch.further_targets()]
        further = self.further(normed, context)
        return [
            # Side by side as sequences of a batch, which tensor parallelism does not split.
            self._loss(torch.cat([value, beside], 1), targets, context, number)
            for number, value, beside in zip(own, normed, further, strict=True)
        ]

    def host(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        """Have experts work for the tokens of others: float[0, hidden]. Collective."""
        if self.further is None or not context.training:
            return value
        return self.further.host(value, context)

    def _loss(
        self, normed: Tensor, targets: Sequence[Tensor], context: MicroBatchContext, number: int
    ) -> Tensor:
        """The sum of the token losses of one slice, or those of the next tokens and further ones.

        Args:
            normed: what each is predicted from, side by side.
            targets: of each, int64[micro_batch, seq_len].
        """
        assert context.batch is not None
        wanted = torch.cat([one.t()[context.slices.tokens(number)] for one in targets], 1)
        is_whole = context.batch.documents is None and len(targets) == 1
        ignored = None if is_whole else wanted < 0
        factors = (1.0, self._further_factor)[: len(targets)]
        first_rows = self.projection.first_rows
        if self._vocab_chunk:
            return chunked_cross_entropy_sum(
                normed,
                list(self.projection),
                self._queue.of(number),
                wanted,
                first_rows,
                self._tp,
                self._vocab_chunk,
                ignored,
                context.z_loss,
                factors,
            )
        logits = self._projected(normed, number)
        return cross_entropy_sum(
            logits, wanted, first_rows, self._tp, ignored, context.z_loss, factors
        )
