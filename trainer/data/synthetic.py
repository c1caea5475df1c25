"""Synthetic data: a seeded order-1 Markov chain over the vocabulary. No files.

Every token has four possible successors, taken with probabilities 1/2, 1/4, 1/8 and 1/8. Each of
the four is a permutation of the vocabulary, so every token is equally frequent in the long run (a
model of single tokens learns nothing) while the next token has at most 1.75 bits = 1.213 nats of
entropy, whatever the vocabulary: the floor of the loss is known.

Documents, where they matter, have lengths that are uniform in their logarithm, so very uneven ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from holdfast import _native
from holdfast.parallel.errors import DataError
from holdfast.parallel.keyed_random import stream_key
from holdfast.trainer.data.dataset import NOTHING, Sequences

PROBABILITIES = (0.5, 0.25, 0.125, 0.125)
# a uniform uint32 below THRESHOLDS[k], and not below the one before, chooses successor k
THRESHOLDS = np.array([2**31, 2**31 + 2**30, 2**31 + 2**30 + 2**29], dtype=np.uint32)
# samples never run out in practice; beyond this they repeat
SIZE = 2**40


@dataclass(frozen=True, slots=True)
class MarkovSamples:
    """The samples of a split: sample i is a pure function of (seed, split, i).

    Attributes:
        successors: int64[4 * vocab]: successor k of token v stands at k * vocab + v.
    """

    vocab: int
    seq_len: int
    seed: int
    split: str
    successors: np.ndarray
    by_document: bool = False

    @property
    def size(self) -> int:
        """Number of distinct samples."""
        return SIZE

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        named = f"synthetic 1 {self.vocab} {self.seq_len} {self.seed} {self.split}"
        if self.by_document:
            named += " documents 1"
        return blake2b(named.encode(), digest_size=16).hexdigest()

    @property
    def entropy(self) -> float:
        """Entropy of the next token given the one before, in nats: the lowest reachable loss.

        Exact for this chain: successors that coincide add up.
        """
        chosen = self.successors.reshape(len(PROBABILITIES), self.vocab)
        matrix_rows = np.tile(np.arange(self.vocab), len(PROBABILITIES))
        pairs, inverse = np.unique(matrix_rows * self.vocab + chosen.ravel(), return_inverse=True)
        weights = np.repeat(PROBABILITIES, self.vocab)
        mass = np.bincount(inverse, weights=weights, minlength=len(pairs))
        return float(-(mass * np.log(mass)).sum() / self.vocab)

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        chains = self._chains(start, count)
        tokens, targets = chains[:, :-1], chains[:, 1:]
        if not self.by_document:
            return Sequences(tokens, targets)
        lengths = [self._lengths(start + row) for row in range(count)]
        targets = targets.copy()
        for row, own in enumerate(lengths):
            # The first token of a document is not predicted from the one before.
            targets[row, np.cumsum(own)[:-1] - 1] = NOTHING
        return Sequences(tokens, targets, tuple(lengths))

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The numbers of samples start..start+count-1."""
        return np.arange(start, start + count, dtype=np.int64) % SIZE

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples."""
        total = count * self.seq_len
        if self.by_document:
            total -= sum(len(self._lengths(start + row)) - 1 for row in range(count))
        return total

    def _lengths(self, index: int) -> tuple[int, ...]:
        """The lengths of a sample's documents."""
        key = stream_key(self.seed, "data synthetic documents", self.split)
        stride = -(-self.seq_len // 4) * 4
        draws = np.empty(stride, dtype=np.uint32)
        offset = index % SIZE * stride
        _native.philox_uint32(draws.ctypes.data, stride, key.key, key.stream, offset)
        drawn = ((self.seq_len + 1.0) ** (draws / 2.0**32)).astype(np.int64)
        ends = np.minimum(np.cumsum(drawn), self.seq_len)
        last = int(np.argmax(ends == self.seq_len))
        return tuple(np.diff(ends[: last + 1], prepend=0).tolist())

    def _chains(self, start: int, count: int) -> np.ndarray:
        """The tokens of samples, each with its last target: int64[count, seq_len + 1]."""
        key = stream_key(self.seed, "data synthetic samples", self.split)
        length = self.seq_len + 1
        # every sample begins at a whole block of the generator
        stride = -(-length // 4) * 4
        draws = np.empty((count, stride), dtype=np.uint32)
        for row in range(count):
            offset = (start + row) % SIZE * stride
            _native.philox_uint32(draws[row].ctypes.data, stride, key.key, key.stream, offset)
        draws = draws[:, :length]
        base = np.searchsorted(THRESHOLDS, draws, side="right").T * self.vocab
        tokens = np.empty((length, count), dtype=np.int64)
        tokens[0] = draws[:, 0].astype(np.uint64) * np.uint64(self.vocab) >> np.uint64(32)
        for position in range(1, length):
            tokens[position] = self.successors[base[position] + tokens[position - 1]]
        return np.ascontiguousarray(tokens.T)


def markov_samples(
    *, vocab: int, seq_len: int, seed: int, split: str, by_document: bool = False
) -> MarkovSamples:
    """The chain of a seed: the same for both splits, whose samples are drawn independently.

    Args:
        by_document: whether samples have documents; their tokens are the same.

    Raises:
        DataError: the vocabulary has fewer than two tokens.
    """
    if vocab < 2:
        raise DataError(
            f"model.vocab = {vocab}: synthetic data needs at least 2 tokens; set it to 2 or more"
        )
    successors = np.empty(len(PROBABILITIES) * vocab, dtype=np.int64)
    for choice in range(len(PROBABILITIES)):
        part = successors[choice * vocab : (choice + 1) * vocab]
        key = stream_key(seed, "data synthetic chain", choice).key
        _native.permute_indices(part.ctypes.data, 0, vocab, vocab, key)
    return MarkovSamples(vocab, seq_len, seed, split, successors, by_document)
