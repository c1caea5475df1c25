"""The micro-batches of the running step, for the model chunks of one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.parallel.comm import FlightRecorder
from holdfast.parallel.pipeline import MicroBatchContext
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import Dataset


class MicroBatches:
    """The context of each micro-batch, with tokens if this rank's chunks read them. Local."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        device: torch.device,
        *,
        reads_tokens: bool,
        recorder: FlightRecorder,
    ) -> None:
        """Begin with the first step.

        Args:
            data: the data of the first step.
            reads_tokens: whether this rank has the first or the last chunk.
            recorder: the flight recorder, where reads are marked.
        """
        self._recorder, self._grace_s = recorder, config.elastic.startup_grace_s
        self._train, self._device, self._reads_tokens = config.train, device, reads_tokens
        self.current = 0
        """The micro-batch whose forward pass ran last."""
        self.begin(0, data, training=True)

    def begin(self, step: int, data: Dataset, *, training: bool) -> None:
        """Begin another step (counted from 0), or another batch of an evaluation."""
        self.step, self.training, self._data = step, training, data
        self.current = 0
        self._tokens: dict[int, Tensor] = {}

    def context(self, micro_batch: int) -> MicroBatchContext:
        """The context of the micro-batch that a chunk computes next."""
        self.current = micro_batch
        tokens = self._tokens_of(micro_batch) if self._reads_tokens else None
        return MicroBatchContext(self.step, micro_batch, self.training, tokens)

    def _tokens_of(self, micro_batch: int) -> Tensor:
        """int64[micro_batch, seq_len + 1]; read once for both the first and the last chunk."""
        tokens = self._tokens.get(micro_batch)
        if tokens is None:
            with self._recorder.busy("read", self._grace_s):
                read = self._data.batch(
                    self.step,
                    micro_batch,
                    global_batch=self._train.global_batch,
                    micro_batch_size=self._train.micro_batch,
                )
            tokens = read.to(self._device)
            self._tokens[micro_batch] = tokens
        return tokens
