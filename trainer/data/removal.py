"""Samples without some of them: what is removed leaves its place, and nothing in it.

A removed sample's tokens are all 0 and nothing is predicted in it, as in padding. All other samples
stay in the steps and micro-batches that they are in, so that a run that removes a sample on its way
has the bits of one that never had it, if it had not read the sample before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.parallel.errors import DataError
from holdfast.trainer.data.dataset import NOTHING, Samples, Sequences


@dataclass(frozen=True, slots=True)
class RemainingSamples:
    """Samples, of which some are removed.

    Attributes:
        source: all samples.
        firsts: by the number of a removed sample, the index from which on it is removed.
    """

    source: Samples
    firsts: Mapping[int, int]

    @property
    def size(self) -> int:
        """Number of distinct samples, the removed ones included: they keep their places."""
        return self.source.size

    @property
    def fingerprint(self) -> str:
        """That of all samples: what is removed, the configuration says."""
        return self.source.fingerprint

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The numbers of samples start..start+count-1."""
        return self.source.numbers(start, count)

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        removed = set(self._removed(start, count))
        if not removed:
            return self.source.sequences(start, count)
        rows = [
            emptied(self.source.sequences(index, 1))
            if index in removed
            else self.source.sequences(index, 1)
            for index in range(start, start + count)
        ]
        return Sequences.joined(rows)

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples; no token is read."""
        removed = self._removed(start, count)
        total = self.source.predicted(start, count)
        return total - sum(self.source.predicted(index, 1) for index in removed)

    def _removed(self, start: int, count: int) -> list[int]:
        """The indices among these that are removed."""
        numbers = self.source.numbers(start, count).tolist()
        return [
            index
            for index, number in enumerate(numbers, start)
            if self.firsts.get(number, index + 1) <= index
        ]


def emptied(sequences: Sequences) -> Sequences:
    """Sequences of as many places in which nothing is read and nothing is predicted. Pure."""
    length = sequences.tokens.shape[1]
    return Sequences(
        np.zeros_like(sequences.tokens),
        np.full_like(sequences.targets, NOTHING),
        None if sequences.lengths is None else ((length,),) * len(sequences.tokens),
    )


def all_samples(samples: Samples) -> Samples:
    """The samples, the removed ones included. Pure."""
    return samples.source if isinstance(samples, RemainingSamples) else samples


def without(samples: Samples, removed: Sequence[tuple[int, Sequence[int]]]) -> Samples:
    """The samples without some of them, and without those that they lack already.

    Args:
        removed: the first index from which on samples are removed, and their numbers.
    Raises:
        DataError: there is no sample of such a number.
    """
    source = all_samples(samples)
    firsts = dict(samples.firsts) if isinstance(samples, RemainingSamples) else dict[int, int]()
    for first, numbers in removed:
        for number in numbers:
            if not 0 <= number < source.size:
                raise DataError(
                    f"data.without names sample {number}: the data has {source.size:,} samples, "
                    "counted from 0"
                )
            firsts[number] = min(first, firsts.get(number, first))
    return RemainingSamples(source, firsts) if firsts else source
