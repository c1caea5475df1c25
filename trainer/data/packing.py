"""Samples made of whole documents, packed into sequences by best fit.

The method is that of Ding et al. 2024 with a bounded number of open sequences: documents come in
the order of the corpus, and each goes into the open sequence with the least room that suffices. A
document of n tokens takes n - 1 places: one for each token that is predicted. What exceeds a
sequence is cut into full sequences first. Every token but the first of each document is predicted
once in an epoch. Places that no document fills are padding, of which nothing is predicted.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

import numpy as np

from holdfast import _native
from holdfast.parallel.errors import DataError
from holdfast.trainer.data.dataset import NOTHING, Sequences
from holdfast.trainer.data.permutation import EpochOrder
from holdfast.trainer.data.windows import StreamPart, check_tokens


@dataclass(frozen=True, slots=True)
class Packing:
    """The pieces of documents in each sequence. Places are counted through all parts."""

    starts: np.ndarray
    """int64[pieces]: the place of each piece's first token, sequence after sequence."""
    lengths: np.ndarray
    """int64[pieces]: the tokens that are predicted in it."""
    first: np.ndarray
    """int64[sequences + 1]: the first piece of each sequence; ascending."""
    filled: np.ndarray
    """int64[sequences]: the tokens that are predicted in each."""

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.filled)


def pack(starts: np.ndarray, stops: np.ndarray, *, seq_len: int, buffer: int) -> Packing:
    """Pack documents into sequences. Pure; linear in the number of documents.

    Args:
        starts, stops: int64[documents], their ranges of tokens.
        buffer: the sequences that are open at once, 1 or more; the fullest is closed for another.
    """
    predicted = np.maximum(stops - starts - 1, 0)
    whole, rest = np.divmod(predicted, seq_len)
    # Full pieces are sequences of their own, numbered first, in the order of the corpus.
    full = np.repeat(starts, whole)
    within = np.arange(len(full)) - np.repeat(np.cumsum(whole) - whole, whole)
    full = full + within * seq_len
    left = np.flatnonzero(rest)
    lengths = np.ascontiguousarray(rest[left])
    chosen = np.empty(len(left), dtype=np.int64)
    _native.best_fit(
        chosen.ctypes.data, lengths.ctypes.data, len(lengths), seq_len, min(buffer, 2**40)
    )
    order = np.argsort(chosen, kind="stable")
    pieces_of = np.bincount(chosen) if len(chosen) else np.empty(0, dtype=np.int64)
    lengths = np.concatenate([np.full(len(full), seq_len), lengths[order]])
    first = np.cumsum(np.concatenate([[0], np.ones(len(full), dtype=np.int64), pieces_of]))
    filled = np.add.reduceat(lengths, first[:-1]) if len(lengths) else lengths
    rest_starts = (starts + whole * seq_len)[left][order]
    return Packing(np.concatenate([full, rest_starts]), lengths, first, filled)


@dataclass(frozen=True, slots=True)
class PackedSamples:
    """Packed sequences of one or more corpora taken as one, in a new order every epoch.

    Attributes:
        parts: one per corpus.
        first_places: of each part: the place that its first token has in `packing`.
        order: over all sequences.
    """

    parts: tuple[StreamPart, ...]
    first_places: tuple[int, ...]
    packing: Packing
    order: EpochOrder
    seq_len: int
    vocab: int
    buffer: int

    @property
    def size(self) -> int:
        """Number of distinct samples: one epoch."""
        return self.order.size

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        ranges = [
            (part.stream.fingerprint, part.stream.documents.fingerprint, part.start, part.stop)
            for part in self.parts
        ]
        named = (
            f"best fit 1 {self.seq_len} {self.buffer} {self.order.seed} {self.order.name} {ranges}"
        )
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        numbers = self.order.items(start, count).tolist()
        return Sequences.joined([self._sequence(number) for number in numbers])

    def _sequence(self, number: int) -> Sequences:
        packing = self.packing
        tokens = np.zeros((1, self.seq_len), dtype=np.int64)
        targets = np.full((1, self.seq_len), NOTHING, dtype=np.int64)
        lengths: list[int] = []
        at = 0
        for piece in range(int(packing.first[number]), int(packing.first[number + 1])):
            length = int(packing.lengths[piece])
            read = self._read(int(packing.starts[piece]), length + 1)
            tokens[0, at : at + length] = read[:-1]
            targets[0, at : at + length] = read[1:]
            lengths.append(length)
            at += length
        padding = [self.seq_len - at] if at < self.seq_len else []
        return Sequences(tokens, targets, ((*lengths, *padding),))

    def _read(self, place: int, count: int) -> np.ndarray:
        """Tokens of one document.

        Raises:
            DataError: a token lies outside the vocabulary.
        """
        which = bisect_right(self.first_places, place) - 1
        part = self.parts[which]
        start = part.start + place - self.first_places[which]
        tokens = part.stream.read(start, start + count)
        check_tokens(tokens, self.vocab, name=part.stream.name, start=start)
        return tokens

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The packed sequences of samples start..start+count-1."""
        return self.order.items(start, count)

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples; no token is read."""
        return int(self.packing.filled[self.order.items(start, count)].sum())


def packed_samples(
    parts: tuple[StreamPart, ...], *, seq_len: int, vocab: int, seed: int, name: str, buffer: int
) -> PackedSamples:
    """The documents of the parts, packed. Reads where they begin, and no token.

    Args:
        name: keys the order of sequences together with the seed.
        buffer: the sequences that are open at once.
    Raises:
        DataError: no document has two tokens.
    """
    places = (0, *accumulate(part.stop - part.start for part in parts))
    edges = [
        np.unique([*part.stream.documents.within(part.start, part.stop), part.start, part.stop])
        - part.start
        + place
        for part, place in zip(parts, places, strict=False)
    ]
    packing = pack(
        np.concatenate([edge[:-1] for edge in edges]),
        np.concatenate([edge[1:] for edge in edges]),
        seq_len=seq_len,
        buffer=buffer,
    )
    if not packing.count:
        raise DataError(
            f"{parts[0].stream.name}: no document has two tokens, so nothing can be predicted; use "
            'other data, or data.packing = "concatenated"'
        )
    order = EpochOrder(packing.count, seed, name)
    return PackedSamples(parts, places[:-1], packing, order, seq_len, vocab, buffer)
