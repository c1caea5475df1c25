"""The micro-batches of the running step, for the model chunks of one rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from holdfast.parallel.comm import FlightRecorder
from holdfast.parallel.layout import Slices
from holdfast.parallel.pipeline import Batch, MicroBatchContext
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import Dataset


def reads_batches(config: RunConfig, chunks: Iterable[int], last_chunk: int) -> bool:
    """Whether a rank with these chunks reads batches: for tokens, targets, or documents."""
    return config.data.packing != "concatenated" or not {0, last_chunk}.isdisjoint(chunks)


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
    ) -> None:
        """Begin with the first step.

        Args:
            data: the data of the first step.
            slices: the slices of sequences, and those that this rank computes.
            reads: whether this rank reads batches; see `reads_batches`.
            recorder: the flight recorder, where reads are marked.
        """
        self._recorder, self._grace_s = recorder, config.elastic.startup_grace_s
        self._train, self._device, self._reads = config.train, device, reads
        self.slices = slices
        self.current = 0
        """The micro-batch whose forward pass ran last."""
        self.begin(0, data, training=True)

    def begin(self, step: int, data: Dataset, *, training: bool) -> None:
        """Begin another step (counted from 0), or another batch of an evaluation."""
        self.step, self.training, self._data = step, training, data
        self.current = 0
        self.predicted = max(1, data.predicted(step, global_batch=self._train.global_batch))
        """The number of tokens that the step predicts, over all replicas; 1 if it predicts none."""
        self._batches: dict[int, Batch] = {}

    def context(self, micro_batch: int) -> MicroBatchContext:
        """The context of the micro-batch that a chunk computes next."""
        self.current = micro_batch
        batch = self._batch(micro_batch) if self._reads else None
        return MicroBatchContext(
            self.step, micro_batch, self.training, batch, 1.0 / self.predicted, self.slices
        )

    def _batch(self, micro_batch: int) -> Batch:
        """A micro-batch, read once for all chunks of the rank."""
        batch = self._batches.get(micro_batch)
        if batch is None:
            with self._recorder.busy("read", self._grace_s):
                read = self._data.batch(
                    self.step,
                    micro_batch,
                    global_batch=self._train.global_batch,
                    micro_batch_size=self._train.micro_batch,
                )
            batch = self._batches[micro_batch] = read.to(self._device)
        return batch
