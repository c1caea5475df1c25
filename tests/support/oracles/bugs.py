"""Published bugs of layouts, each as a context manager that puts it into the running project.

The numbers are those of the collections they were published in; tests/trainer/test_pitfalls.py
shows that `holdfast check` finds each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from holdfast.parallel.layout import GradientMark
from holdfast.parallel.optimizer import sharded as optimizer
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.exchange.buckets import Bucket
from holdfast.parallel.optimizer.exchange.gradients import GradientExchange
from holdfast.parallel.optimizer.exchange.wire import PackedWire, PlainWire
from holdfast.parallel.pipeline import Passage, executor as pipeline
from holdfast.parallel.pipeline.model_chunk import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import linear, split, vocab as vocabulary
from holdfast.parallel.tensor_parallel.split import TensorParallel
from holdfast.parallel.tensor_parallel.strips import WholeRows
from holdfast.parallel.tensor_parallel.sums import tree_sum
from holdfast.trainer.models.decoder import ends
from holdfast.trainer.step import planning, training
from holdfast.trainer.step.micro_batches.contexts import MicroBatches
from holdfast.trainer.step.training import Training


def _patched_specs(change: Any) -> Any:
    """Every parameter row passed through `change`."""
    original = planning.layer_specs

    def changed(*args: Any, **kwargs: Any) -> Any:
        return tuple(
            replace(
                layer,
                parameters=tuple(tuple(change(s) for s in specs) for specs in layer.parameters),
            )
            for layer in original(*args, **kwargs)
        )

    return changed


@contextmanager
def changed_specs(change: Any) -> Iterator[None]:
    """Every parameter row passed through `change`."""
    with mock.patch.object(planning, "layer_specs", _patched_specs(change)):
        yield


@contextmanager
def norm_weights_not_summed_over_tensor() -> Iterator[None]:
    """A replicated weight not flagged for sequence parallelism."""
    with changed_specs(lambda s: replace(s, summed=()) if len(s.shape) == 1 else s):
        yield


@contextmanager
def shared_kv_heads_not_summed() -> Iterator[None]:
    """Key and value heads replicated over tensor ranks drift apart."""
    with changed_specs(
        lambda s: replace(s, summed=()) if "k_proj" in s.name or "v_proj" in s.name else s
    ):
        yield


@contextmanager
def replicated_weights_counted_by_every_rank() -> Iterator[None]:
    """Replicated weights enter the gradient norm once per tensor rank."""
    original = optimizer.ShardedOptimizer.reduce

    def counted(self: optimizer.ShardedOptimizer) -> tuple[torch.Tensor, int]:
        squares, flags = original(self)
        for block in self.owned:
            squares[self.slot(block.key)] *= len(block.spec.copies)
        return squares, flags

    with mock.patch.object(optimizer.ShardedOptimizer, "reduce", counted):
        yield


@contextmanager
def tied_weight_counted_twice() -> Iterator[None]:
    """The second use of a tied weight is added twice."""
    original = GradientExchange._own_sums

    def doubled(exchange: Any, bucket: Bucket) -> tuple[torch.Tensor, bool]:
        total, is_view = original(exchange, bucket)
        if len(bucket.uses) == 2:
            part = exchange._accumulator.part
            total += torch.cat([part(span.start, span.stop) for span in bucket.second])
        return total, is_view

    with mock.patch.object(GradientExchange, "_own_sums", doubled):
        yield


def _own_partials(self: TensorParallel, product: Any, rows: int) -> Any:
    """The sum of a rank's own parts, without the other ranks'."""
    return lambda: tree_sum(product(slice(0, rows)))


@contextmanager
def copy_to_group_without_all_reduce() -> Iterator[None]:
    """The backward pass of a column-parallel layer forgets its all-reduce."""
    original = linear._ColumnLinear.backward

    def forgetting(ctx: Any, *gradients: Any) -> Any:
        with mock.patch.object(TensorParallel, "leaving", _own_partials):
            return original(ctx, *gradients)

    with mock.patch.object(linear._ColumnLinear, "backward", staticmethod(forgetting)):
        yield


@contextmanager
def row_parallel_without_sum() -> Iterator[None]:
    """A row-parallel layer keeps its partial output."""
    original = linear._RowLinear.forward

    def forgetting(ctx: Any, *arguments: Any) -> Any:
        with mock.patch.object(TensorParallel, "leaving", _own_partials):
            return original(ctx, *arguments)

    with mock.patch.object(linear._RowLinear, "forward", staticmethod(forgetting)):
        yield


@contextmanager
def row_parallel_scatter_without_sum() -> Iterator[None]:
    """The reduce-scatter takes the first rank's part without adding the others'."""
    with mock.patch.object(split, "sum_in_order", lambda parts: parts[0]):
        yield


@contextmanager
def gradient_summed_once_too_often() -> Iterator[None]:
    """The sum over the group is also taken in backward."""

    def summed(self: TensorParallel, value: torch.Tensor) -> WholeRows:
        return WholeRows(self.sum([value.clone()]))

    original = linear._RowLinear.backward

    def summing(ctx: Any, gradient: Any) -> Any:
        with mock.patch.object(TensorParallel, "arriving", summed):
            return original(ctx, gradient)

    with mock.patch.object(linear._RowLinear, "backward", staticmethod(summing)):
        yield


@contextmanager
def cross_entropy_over_local_vocabulary() -> Iterator[None]:
    """The loss normalises over this rank's part of the vocabulary only."""
    original = ends.cross_entropy_sum

    def local(logits: Any, targets: Any, first_rows: Any, tp: Any, *others: Any) -> torch.Tensor:
        return original(logits, targets, first_rows, TensorParallel(None, False), *others)

    with mock.patch.object(ends, "cross_entropy_sum", local):
        yield


@contextmanager
def vocabulary_split_rounded_down() -> Iterator[None]:
    """A vocabulary that does not divide: embedding rows looked up at the rounded-down start."""

    def rounded(tokens: Any, weights: Any, queue: Any, first_rows: Any) -> torch.Tensor:
        return vocabulary.embed(tokens, weights, queue, [max(0, row - 1) for row in first_rows])

    with mock.patch.object(ends, "embed", rounded):
        yield


@contextmanager
def dropout_equal_on_sequence_shards() -> Iterator[None]:
    """Every sequence shard draws the first shard's mask."""
    with mock.patch.object(TensorParallel, "element_offset", return_value=0):
        yield


@contextmanager
def loss_averaged_over_replicas() -> Iterator[None]:
    """The gradient is scaled by the replica's own micro-batches: a mean of means."""
    original = Training._start

    def own(self: Training, step: int, data: Any, *, training: bool) -> None:
        original(self, step, data, training=training)
        replica = self.plan.stage_replicas.coordinates(self.rank).data
        train = self.config.train
        count = len(self.plan.micro_batches[replica]) * train.micro_batch
        self._micro_batches.predicted = count * train.seq_len

    with mock.patch.object(Training, "_start", own):
        yield


@contextmanager
def gradient_scaled_by_pipeline() -> Iterator[None]:
    """The last stage's loss gradient is multiplied by the number of micro-batches."""
    original = MicroBatches.context

    def scaled(self: MicroBatches, passage: Passage) -> MicroBatchContext:
        context = original(self, passage)
        return replace(context, loss_gradient=3 * context.loss_gradient)

    with mock.patch.object(MicroBatches, "context", scaled):
        yield


@contextmanager
def stage_without_documents() -> Iterator[None]:
    """Stages between the first and the last of a pipeline know no documents."""

    def of_tokens(_: Any, chunks: Any, last_chunk: int) -> bool:
        return not {0, last_chunk}.isdisjoint(chunks)

    with mock.patch.object(training, "reads_batches", of_tokens):
        yield


@contextmanager
def clipping_by_own_norm() -> Iterator[None]:
    """Every rank clips by the norm of the blocks it owns."""
    original = Training.vote

    def own(self: Training, squares: torch.Tensor, flags: int) -> Any:
        outcome = original(self, squares, flags)
        norm = optimizer.norm_from_squares(squares.tolist())
        return replace(outcome, grad_norm=norm)

    with mock.patch.object(Training, "vote", own):
        yield


@contextmanager
def weight_gradients_computed_twice() -> Iterator[None]:
    """A split backward runs the weight gradients in both of its parts."""
    original = WeightGradientQueue.put

    def twice(
        self: WeightGradientQueue, parameter: Any, grad_output: Any, value: Any, marks: Any = ()
    ) -> None:
        original(self, parameter, grad_output, value, marks)
        if self.defers and self.has_sink:
            marks = marks or (GradientMark(len(value)),)
            self._sink.add_matmul(parameter, grad_output, value.detach(), marks)

    with mock.patch.object(WeightGradientQueue, "put", twice):
        yield


@contextmanager
def replica_reads_another_ones_samples() -> Iterator[None]:
    """All replicas read the first replica's samples."""
    original = Training._start

    def first(self: Training, step: int, data: Any, *, training: bool) -> None:
        replica = self.plan.stage_replicas.coordinates(self.rank).data
        read: Any = _FirstSamples(data) if replica else data
        original(self, step, read, training=training)

    with mock.patch.object(Training, "_start", first):
        yield


class _FirstSamples:
    """Data that has the first micro-batch of a step in place of all others."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def batch(self, step: int, micro_batch: int, **sizes: int) -> Any:
        return self._data.batch(step, 0, **sizes)

    def predicted(self, step: int, **sizes: int) -> int:
        return self._data.predicted(step, **sizes)


@contextmanager
def replicas_not_summed() -> Iterator[None]:
    """The owner keeps its own sum."""

    def own_alone(wire: Any, message: Any, own: torch.Tensor, total: torch.Tensor) -> int:
        total.copy_(own)
        return 0

    with (
        mock.patch.object(PlainWire, "add", own_alone),
        mock.patch.object(PackedWire, "add", own_alone),
    ):
        yield


@contextmanager
def parameters_not_gathered() -> Iterator[None]:
    """Updated blocks stay with their owners."""
    with (
        mock.patch.object(optimizer, "send_bucket", return_value=[]),
        mock.patch.object(optimizer, "receive_buckets", return_value=[]),
    ):
        yield


@contextmanager
def messages_in_order_without_tags() -> Iterator[None]:
    """Messages matched by order alone: what interleaved schedules of two ranks cannot bear."""
    with mock.patch.object(pipeline, "message_tag", return_value=0):
        yield


@contextmanager
def gradients_kept_from_the_last_step() -> Iterator[None]:
    """Sums are not cleared between steps."""
    with mock.patch.object(GradientAccumulator, "clear", return_value=None):
        yield
