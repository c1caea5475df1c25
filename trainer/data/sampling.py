"""The sample indices of a step and micro-batch: the only place that computes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from holdfast.trainer.data.dataset import Samples


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

    def sample(self, index: int) -> np.ndarray:
        """Sample `index`: int64[seq_len + 1].

        Raises:
            ValueError: the index is negative.
        """
        if index < 0:
            raise ValueError(f"sample index {index}: samples are counted from 0")
        return self.samples.rows(index, 1)[0]

    def batch(
        self, step: int, micro_batch: int, *, global_batch: int, micro_batch_size: int
    ) -> torch.Tensor:
        """One micro-batch: int64[micro_batch_size, seq_len + 1], on the CPU.

        Raises:
            ValueError: the step is negative, or has no such micro-batch.
        """
        if step < 0 or not 0 <= micro_batch < global_batch // micro_batch_size:
            raise ValueError(
                f"step {step}, micro-batch {micro_batch}: steps count from 0 and a step has "
                f"{global_batch // micro_batch_size} micro-batches"
            )
        start = step * global_batch + micro_batch * micro_batch_size
        return torch.from_numpy(self.samples.rows(start, micro_batch_size))
