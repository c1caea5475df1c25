"""Published bugs of context parallelism and of packed documents, each as a context manager.

As bugs.py, which tests/trainer/test_pitfalls.py shows found; the names say what each forgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from holdfast.parallel.context_parallel import operators, ring
from holdfast.parallel.context_parallel.operators import ContextParallel
from holdfast.parallel.pipeline import Passage
from holdfast.trainer.models.decoder import attention, ends, norms, regions
from holdfast.trainer.models.decoder.rotary import RotaryTables
from holdfast.trainer.step.micro_batches.contexts import MicroBatches


@contextmanager
def positions_restart_in_each_slice() -> Iterator[None]:
    """Every slice is rotated as if it were the first."""
    original = attention.attend_sliced

    def local(projected: Any, rotary: Any, context: Any, slices: Any, *rest: Any) -> Any:
        first = RotaryTables(*(table[: slices.length].repeat(slices.count, 1) for table in rotary))
        return original(projected, first, context, slices, *rest)

    with mock.patch.object(attention, "attend_sliced", local):
        yield


@contextmanager
def labels_shifted_after_the_split() -> Iterator[None]:
    """The last token of a slice predicts the first of its own slice, not of the next."""
    original = ends.Head._loss

    def shifted(self: Any, value: Any, targets: Any, context: Any, number: int) -> Any:
        places = context.slices.tokens(number)
        changed = targets[0].clone()
        changed[:, places.stop - 1] = context.batch.tokens[:, places.start]
        return original(self, value, [changed, *targets[1:]], context, number)

    with mock.patch.object(ends.Head, "_loss", shifted):
        yield


@contextmanager
def loss_scaled_by_context() -> Iterator[None]:
    """The gradient of the loss is that of the mean over this rank's own tokens."""
    original = MicroBatches.context

    def scaled(self: MicroBatches, passage: Passage) -> Any:
        found = original(self, passage)
        share = found.slices.count / len(found.slices.own)
        return replace(found, loss_gradient=found.loss_gradient * share)

    with mock.patch.object(MicroBatches, "context", scaled):
        yield


@contextmanager
def dropout_equal_on_slices() -> Iterator[None]:
    """Every slice draws the first slice's mask."""
    original = norms.KeyedDropout.forward

    def first(self: Any, value: Any, context: Any, number: int = 0) -> Any:
        return original(self, value, context, 0)

    with mock.patch.object(norms.KeyedDropout, "forward", first):
        yield


@contextmanager
def key_gradients_of_own_queries_only() -> Iterator[None]:
    """What the queries of other ranks give to this rank's keys and values is lost."""
    original = operators._summed

    def own(slices: Any, group: Any, of_queries: Any) -> Any:
        kept = {number: tuple(map(torch.clone, both)) for number, both in of_queries.items()}
        for part in (part for both in kept.values() for part in both):
            for other in set(range(slices.count)).difference(slices.own):
                part[:, :, slices.tokens(other)] = 0
        return original(slices, group, kept)

    with mock.patch.object(operators, "_summed", own):
        yield


@contextmanager
def ring_keys_keep_no_gradients() -> Iterator[None]:
    """What queries give to keys of other slices does not go round the ring with them."""
    original = ring.KeyGradients.add

    def own(self: Any, *given: Any, causal: bool, **others: Any) -> Any:
        kept = [part.clone() for part in self.both]
        found = original(self, *given, causal=causal, **others)
        if not causal:
            for part, before in zip(self.both, kept, strict=True):
                part.copy_(before)
        return found

    with mock.patch.object(ring.KeyGradients, "add", own):
        yield


@contextmanager
def ring_attends_across_documents() -> Iterator[None]:
    """What goes round the ring is attended to as if there were one document."""
    original = ring.parts_of

    def across(work: Any, queries: int, keys: int) -> Any:
        return original(replace(work, documents=None) if keys < queries else work, queries, keys)

    with mock.patch.object(ring, "parts_of", across):
        yield


@contextmanager
def slices_attend_across_documents() -> Iterator[None]:
    """Attention of slices is causal over the whole sequence, as if there were one document."""
    original = ContextParallel.attend

    def across(self: Any, query: Any, key: Any, value: Any, slices: Any, _: Any, *rest: Any) -> Any:
        return original(self, query, key, value, slices, None, *rest)

    with mock.patch.object(ContextParallel, "attend", across):
        yield


@contextmanager
def documents_attend_to_each_other() -> Iterator[None]:
    """Attention is causal over the whole sequence, as if there were one document."""

    def across(
        projected: Any, rotary: Any, documents: Any, heads: int, kv_heads: int, norms: Any
    ) -> Any:
        seq, batch, _ = projected.shape
        tables = rotary.at(documents.positions)
        q, k, v = regions._heads(projected, tables, heads, kv_heads, norms)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return mixed.permute(2, 0, 1, 3).reshape(seq, batch, -1)

    with mock.patch.object(attention, "attend_within", across):
        yield


@contextmanager
def ends_of_documents_are_predicted() -> Iterator[None]:
    """Places that count nothing count as if their target were the first entry."""
    original = ends.cross_entropy_sum

    def counting(
        logits: Any, targets: Any, first_rows: Any, tp: Any, ignored: Any, *others: Any
    ) -> Any:
        return original(logits, targets.clamp(min=0), first_rows, tp, None, *others)

    with mock.patch.object(ends, "cross_entropy_sum", counting):
        yield
