"""The sequences that a model trains on, and the protocols of their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from holdfast.parallel.pipeline import Batch

NOTHING = -1
"""The target where no token is to be predicted."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Training sequences: their tokens, and the token to be predicted after each."""

    tokens: np.ndarray
    """int64[count, seq_len]"""
    targets: np.ndarray
    """int64[count, seq_len]; `NOTHING` where no token is to be predicted."""
    lengths: tuple[tuple[int, ...], ...] | None = None
    """The lengths of each sequence's documents, in order, without a gap; None: documents do not
    matter."""

    @staticmethod
    def joined(parts: Sequence[Sequences]) -> Sequences:
        """The sequences of all parts, in order; documents matter in all of them or in none."""
        lengths = [part.lengths for part in parts]
        return Sequences(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.targets for part in parts]),
            None if None in lengths else tuple(row for rows in lengths if rows for row in rows),
        )


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

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        ...

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The numbers of these samples among the distinct ones: int64[count], 0..size-1.

        A sample has the same number in every epoch and in any order.
        """
        ...

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples; no token is read."""
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

    def sample(self, index: int) -> Sequences:
        """Sample `index` ≥ 0, alone. Epoch `index // size` has its own order."""
        ...

    def batch(
        self, step: int, micro_batch: int, *, global_batch: int, micro_batch_size: int
    ) -> Batch:
        """One micro-batch, on the CPU.

        Row j is sample `step * global_batch + micro_batch * micro_batch_size + j`, whichever rank
        asks.

        Args:
            step: counts from 0.
            micro_batch: global id within the step, 0..global_batch // micro_batch_size - 1.
            global_batch: sequences per step.
            micro_batch_size: sequences per micro-batch.
        """
        ...

    def numbers(self, start: int, count: int) -> tuple[int, ...]:
        """The numbers of samples start..start+count-1 among the distinct ones; see `Samples`."""
        ...

    def without(self, removed: Sequence[tuple[int, Sequence[int]]]) -> Dataset:
        """The same samples without some more of them.

        Args:
            removed: the first sample's index from which on samples are removed, and their numbers.
        Raises:
            DataError: there is no sample of such a number.
        """
        ...

    def corpora_taken(self, count: int) -> tuple[tuple[int, int], ...]:
        """The size of each corpus of a mixture, and how many of the first `count` samples it has.

        A single corpus has all of them.
        """
        ...

    def predicted(self, step: int, *, global_batch: int) -> int:
        """The number of tokens that are predicted in a step, over all its micro-batches."""
        ...
