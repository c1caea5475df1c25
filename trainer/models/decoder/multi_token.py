"""The layer that predicts a further token (DeepSeek-AI 2024, DeepSeek-V3, section 2.2).

At each place it joins the state from which the head predicts the next token, and the embedding of
that token. From these a transformer layer makes the state from which the head predicts the token
after it. It computes in training alone. Exact-mode safe: what it needs of the next slice is in the
batch, and its embedding is a use of a tied weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import TensorParallel
from holdfast.trainer.models.decoder.norms import Queues, joined_linear, part_queues


class MultiTokenLayer(nn.Module):
    """A transformer layer behind the last one, over its states and the next tokens' embeddings."""

    def __init__(
        self,
        hidden: int,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        embedding: nn.Module,
        layer: nn.Module,
        norms: Sequence[nn.Module],
    ) -> None:
        """Local.

        Args:
            embedding: gives the hidden states of tokens, as that of the model.
            norms: of embeddings, of hidden states, and of what it gives.
        """
        super().__init__()
        self._tp, self._queue = tp, queue
        self.embedding, self.layer = embedding, layer
        self.embedding_norm, self.hidden_norm, self.norm = norms
        self.joining = nn.Parameter(torch.empty(hidden, 2 * hidden))

    def forward(self, values: Sequence[Tensor], context: MicroBatchContext) -> list[Tensor]:
        """What the head predicts the further token from, of each own slice. Collective.

        Args:
            values: of each own slice, what the head predicts the next token from.
        """
        assert context.batch is not None
        following = context.batch._replace(tokens=context.batch.next_tokens())
        embedded = self.embedding(None, replace(context, batch=following))
        queues = part_queues(self._queue, context, self._tp)
        joined = list(map(self._joined, embedded, values, context.slices.own, queues))
        found = self.layer(joined, context)
        return list(map(self.norm, found, queues))

    def host(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        """Have the layer's experts work for the tokens of others: float[0, hidden]. Collective."""
        return self.layer.host(value, context)  # pyrefly: ignore[not-callable]

    def _joined(self, embedded: Tensor, value: Tensor, number: int, queues: Queues) -> Tensor:
        """The input of the transformer layer, of slice `number`."""
        sources = [self.embedding_norm(embedded, queues), self.hidden_norm(value, queues)]
        return joined_linear(sources, self.joining, self._queue, number, len(self._tp.own_parts))
