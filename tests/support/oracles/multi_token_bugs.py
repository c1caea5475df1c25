"""Published bugs of multi-token prediction, each as a context manager that puts it into the running
project.

They are those of Megatron-LM's pull requests 6205 and 7452, and issues 4495 and 1532.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from holdfast.parallel.pipeline import Batch
from holdfast.trainer.models.decoder import ends
from holdfast.trainer.models.decoder.multi_token import MultiTokenLayer


def _rolled(values: Tensor, context: Any) -> Tensor:
    """The value after each in its own slice; after the last one, the slice's first."""
    length = context.slices.length or values.shape[1]
    return values.unflatten(1, (-1, length)).roll(-1, 2).flatten(1)


@contextmanager
def _losses(change: Any) -> Iterator[None]:
    """The loss of a slice with other targets: (targets of second tokens, context) -> them."""
    original = ends.Head._loss

    def changed(self: Any, value: Any, targets: Any, context: Any, number: int) -> Any:
        return original(self, value, [targets[0], change(targets[1], context)], context, number)

    with mock.patch.object(ends.Head, "_loss", changed):
        yield


@contextmanager
def second_labels_rolled_in_each_slice() -> Iterator[None]:
    """The last place of a slice predicts a second token of its own slice, not of the next."""
    with _losses(lambda _, context: _rolled(context.batch.targets, context)):
        yield


@contextmanager
def next_tokens_rolled_in_each_slice() -> Iterator[None]:
    """The last place of a slice is given the embedding of the slice's first token."""
    original = MultiTokenLayer.forward

    def rolled(self: Any, values: Any, context: Any) -> Any:
        tokens = _rolled(context.batch.tokens, context)
        with mock.patch.object(Batch, "next_tokens", return_value=tokens):
            return original(self, values, context)

    with mock.patch.object(MultiTokenLayer, "forward", rolled):
        yield


@contextmanager
def second_labels_of_the_next_document() -> Iterator[None]:
    """The last but one place of a document predicts the first token of the next."""

    def across(_: Tensor, context: Any) -> Tensor:
        tokens = context.batch.tokens
        further = torch.full_like(tokens, -1)
        further[:, :-2] = tokens[:, 2:]
        return further

    with _losses(across):
        yield


@contextmanager
def second_loss_of_local_counts() -> Iterator[None]:
    """The gradient of the second tokens' loss is that of the mean over this rank's own."""
    original = ends.Head._loss

    def scaled(self: Any, value: Any, targets: Any, context: Any, number: int) -> Any:
        share = context.slices.count / len(context.slices.own)
        with mock.patch.object(self, "_further_factor", self._further_factor * share):
            return original(self, value, targets, context, number)

    with mock.patch.object(ends.Head, "_loss", scaled):
        yield


@contextmanager
def embedding_of_second_tokens_not_summed() -> Iterator[None]:
    """What second tokens give to the embedding stays on the last stage."""
    original = ends.Embedding.forward

    def apart(self: Any, values: Any, context: Any) -> Any:
        found = original(self, values, context)
        is_second = self.dropout._layer != "embedding"
        return [value.detach() for value in found] if is_second else found

    with mock.patch.object(ends.Embedding, "forward", apart):
        yield
