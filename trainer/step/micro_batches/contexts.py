"""The micro-batches of the running step, for the model chunks of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from holdfast.parallel.comm import FlightRecorder
from holdfast.parallel.layout import Slices
from holdfast.parallel.pipeline import Batch, ExpertTeam, MicroBatchContext, Passage
from holdfast.trainer.config import RunConfig, TrainConfig
from holdfast.trainer.data import Dataset
from holdfast.trainer.step.vote import (
    Notes,
)


def reads_batches(config: RunConfig, chunks: Iterable[int], last_chunk: int) -> bool:
    """Whether a rank with these chunks reads batches: for tokens, targets, or documents."""
    has_documents = config.data.packing != "concatenated" or bool(config.train.length_ramp)
    return has_documents or not {0, last_chunk}.isdisjoint(chunks)


def training_batch(train: TrainConfig, data: Dataset, step: int, micro_batch: int) -> Batch:
    """The sequences of a micro-batch of a training step, counted from 0, on the CPU. Local."""
    size = train.micro_batch
    if train.batch_ramp:  # as the only one of a step of its own size
        unit = train.samples_before(step) // size + micro_batch
        read = data.batch(unit, 0, global_batch=size, micro_batch_size=size)
    else:
        read = data.batch(step, micro_batch, global_batch=train.global_batch, micro_batch_size=size)
    length = train.length_of(step)
    return read.cut(length) if length < train.seq_len else read


def attended_share(batch: Batch | None) -> float:
    """The pairs of queries and keys in a batch's documents, as a share of those in sequences that
    are one document each; 1 where documents do not matter. Pure.
    """
    if batch is None or batch.documents is None:
        return 1.0
    sequences, length = batch.tokens.shape
    return sum(n * n for n in batch.documents.lengths) / (sequences * length * length)


class _Known(NamedTuple):
    """A micro-batch, for all chunks of the rank."""

    batch: Batch | None
    """None where the rank does not read it."""
    kept: dict[object, Any]
    """What modules keep between its stretches."""


class MicroBatches:
    """The context of each micro-batch, with the batch if this rank's chunks read it. Local."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        device: torch.device,
        slices: Slices,
        *,
        reads: bool,
        recorder: FlightRecorder,
        experts: ExpertTeam | None = None,
    ) -> None:
        """Begin with the first step.

        Args:
            data: the data of the first step.
            slices: the slices of sequences, and those that this rank computes.
            reads: whether this rank reads batches; see `reads_batches`.
            recorder: the flight recorder, where reads are marked.
            experts: the ranks that have the experts of the tokens; None: those of the tensor group.
        """
        self._reading = partial(recorder.busy, "read", config.elastic.startup_grace_s)
        self._config, self._device = config, device if reads else None
        self.slices, self._experts = slices, experts
        self.current = 0
        """The micro-batch whose forward pass ran last."""
        self.begin(0, data, training=True)

    def begin(self, step: int, data: Dataset, *, training: bool, noted: Sequence[int] = ()) -> None:
        """Begin another step (counted from 0), or another batch of an evaluation.

        Args:
            noted: the parts whose tokens' outputs of layers are noted, as of `Notes`.
        """
        self.step, self.training, self._data = step, training, data
        self.current = 0
        self.predicted = max(1, self._predicted())
        """The number of tokens that the step predicts, over all replicas; 1 if it predicts none."""
        self._known: dict[int, _Known] = {}
        self.notes = Notes(noted)
        """What layers have noted in this step."""

    def context(self, passage: Passage) -> MicroBatchContext:
        """The context of what a chunk computes next."""
        micro_batch = passage.micro_batch
        if micro_batch >= 0:
            self.current = micro_batch
        if micro_batch not in self._known:
            read = None if micro_batch < 0 else self._read(micro_batch)
            self._known[micro_batch] = _Known(read, {})
        batch, kept = self._known[micro_batch]
        stretch = passage.stretch
        return MicroBatchContext(
            self.step,
            micro_batch,
            self.training,
            batch,
            1.0 / self.predicted,
            self._config.train.z_loss_coef,
            self.slices
            if stretch is None
            else self.slices.stretch(stretch, self._config.parallel.stretches),
            kept,
            self.notes.watch if self.notes.parts else None,
            self.notes.loads,
            self.notes.logits if self.training and self._config.optimizer.qk_clip else None,
            self._experts,
        )

    def computed(self) -> tuple[int, float]:
        """The number of the step's micro-batches that were computed, and their `attended_share`."""
        batches = [known.batch for number, known in self._known.items() if number >= 0]
        return len(batches), sum(map(attended_share, batches))

    def _read(self, micro_batch: int) -> Batch | None:
        if self._device is None:
            return None
        with self._reading():
            if self.training:
                read = training_batch(self._config.train, self._data, self.step, micro_batch)
            else:
                train = self._config.train
                sizes = {
                    "global_batch": train.global_batch,
                    "micro_batch_size": train.micro_batch,
                }
                read = self._data.batch(self.step, micro_batch, **sizes)
        return read.to(self._device)

    def _predicted(self) -> int:
        train = self._config.train
        if not (train.batch_ramp and self.training):
            return self._data.predicted(self.step, global_batch=train.global_batch)
        first = train.samples_before(self.step) // train.micro_batch
        count = train.batch_of(self.step) // train.micro_batch
        return sum(
            self._data.predicted(unit, global_batch=train.micro_batch)
            for unit in range(first, first + count)
        )
