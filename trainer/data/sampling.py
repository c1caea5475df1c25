"""The sample indices of a step and micro-batch: the only place that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from holdfast.parallel.pipeline import Batch, Documents
from holdfast.trainer.data.dataset import Samples, Sequences
from holdfast.trainer.data.mixture import corpora_taken
from holdfast.trainer.data.removal import all_samples, without


@dataclass(frozen=True, slots=True)
class SampledDataset:
    """A `Dataset` over any `Samples`."""

    samples: Samples

    @property
    def size(self) -> int:
        """Number of distinct samples: one epoch."""
        return self.samples.size

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        return self.samples.fingerprint

    def sample(self, index: int) -> Sequences:
        """Sample `index`, alone.

        Raises:
            ValueError: the index is negative.
        """
        if index < 0:
            raise ValueError(f"sample index {index}: samples are counted from 0")
        return self.samples.sequences(index, 1)

    def batch(
        self, step: int, micro_batch: int, *, global_batch: int, micro_batch_size: int
    ) -> Batch:
        """One micro-batch, on the CPU.

        Raises:
            ValueError: the step is negative, or has no such micro-batch.
        """
        if step < 0 or not 0 <= micro_batch < global_batch // micro_batch_size:
            raise ValueError(
                f"step {step}, micro-batch {micro_batch}: steps count from 0 and a step has "
                f"{global_batch // micro_batch_size} micro-batches"
            )
        start = step * global_batch + micro_batch * micro_batch_size
        return as_batch(self.samples.sequences(start, micro_batch_size))

    def numbers(self, start: int, count: int) -> tuple[int, ...]:
        """The numbers of samples start..start+count-1 among the distinct ones."""
        return tuple(self.samples.numbers(start, count).tolist())

    def without(self, removed: Sequence[tuple[int, Sequence[int]]]) -> SampledDataset:
        """The same samples without some more of them; see `Dataset`."""
        return SampledDataset(without(self.samples, removed))

    def corpora_taken(self, count: int) -> tuple[tuple[int, int], ...]:
        """The size of each corpus, and how many of the first `count` samples it has."""
        return corpora_taken(all_samples(self.samples), count)

    def predicted(self, step: int, *, global_batch: int) -> int:
        """The number of tokens that are predicted in a step, over all its micro-batches."""
        return self.samples.predicted(step * global_batch, global_batch)


def as_batch(sequences: Sequences) -> Batch:
    """Sequences as tensors on the CPU, which share their memory."""
    documents = None
    if sequences.lengths is not None:
        documents = Documents.of(chain.from_iterable(sequences.lengths), len(sequences.tokens))
    tokens, targets = map(torch.from_numpy, (sequences.tokens, sequences.targets))
    return Batch(tokens, targets, documents)
