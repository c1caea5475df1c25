"""The protocols of data: `Dataset` for the trainer, `Samples` for each kind of data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


class Samples(Protocol):
    """An endless, seeded sequence of samples: sample i is a pure function of i."""

    @property
    def size(self) -> int:
        """Number of distinct samples: one epoch."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal (content, order, length, split)."""
        ...

    def rows(self, start: int, count: int) -> np.ndarray:
        """Samples start..start+count-1: int64[count, seq_len + 1]."""
        ...


class Dataset(Protocol):
    """The samples of one split, addressed by step and micro-batch. All methods are local."""

    @property
    def size(self) -> int:
        """Number of distinct samples: one epoch."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal (content, order, length, split)."""
        ...

    def sample(self, index: int) -> np.ndarray:
        """Sample `index` ≥ 0: int64[seq_len + 1]. Epoch `index // size` has its own order."""
        ...

    def batch(
        self, step: int, micro_batch: int, *, global_batch: int, micro_batch_size: int
    ) -> torch.Tensor:
        """One micro-batch: int64[micro_batch_size, seq_len + 1], on the CPU.

        Row j is sample `step * global_batch + micro_batch * micro_batch_size + j`, whichever rank
        asks.

        Args:
            step: counts from 0.
            micro_batch: global id within the step, 0..global_batch // micro_batch_size - 1.
            global_batch: sequences per step.
            micro_batch_size: sequences per micro-batch.
        """
        ...
