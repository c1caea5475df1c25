"""Samples cut from token streams: windows of seq_len + 1 tokens at a stride of seq_len."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Protocol

import numpy as np

from holdfast.parallel.errors import DataError, unknown_name
from holdfast.trainer.data.permutation import EpochOrder


class TokenStream(Protocol):
    """A corpus as one sequence of tokens, read by range."""

    @property
    def name(self) -> str:
        """The stream's name in messages: the key and the path."""
        ...

    @property
    def count(self) -> int:
        """Number of tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where the tokens are equal."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1: int64[stop - start]."""
        ...


@dataclass(frozen=True, slots=True)
class StreamPart:
    """Tokens start..stop-1 of a stream: the part that belongs to one split."""

    stream: TokenStream
    start: int
    stop: int

    def windows(self, seq_len: int) -> int:
        """The number of whole windows; each shares its last token with the first of the next."""
        return max(0, (self.stop - self.start - 1) // seq_len)


SPLITS = ("train", "eval")


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is the name of a split."""
    if split not in SPLITS:
        raise ValueError(unknown_name("split", split, SPLITS))


def split_part(
    stream: TokenStream, *, seq_len: int, eval_fraction: float, split: str
) -> StreamPart:
    """The part of a stream for training, or the held-out part at its end.

    The held-out part has at least one window. The two parts share no token.

    Raises:
        DataError: the stream is empty, or too short for a window of every split.
    """
    if stream.count == 0:
        raise DataError(f"{stream.name}: holds no tokens; name files that are not empty")
    window = seq_len + 1
    held_out = max(window, int(stream.count * eval_fraction)) if eval_fraction > 0 else 0
    needed = 2 * window if eval_fraction > 0 else window
    if stream.count - held_out < window:
        longest = (stream.count // 2 if eval_fraction > 0 else stream.count) - 1
        advice = f"set train.seq_len to at most {longest} or add" if longest > 0 else "add"
        kept = " (one window to train on, one held out)" if eval_fraction > 0 else ""
        if stream.count >= needed:
            advice = "lower data.eval_fraction or add"
        raise DataError(
            f"{stream.name}: {stream.count} tokens are too few for train.seq_len = {seq_len}, "
            f"which needs at least {needed}{kept}; {advice} text"
        )
    if split == "train":
        return StreamPart(stream, 0, stream.count - held_out)
    check_split(split)
    if held_out == 0:
        raise DataError(
            "data.eval_fraction = 0 holds nothing out to evaluate on: set it above 0, or "
            "train.eval_every to 0"
        )
    return StreamPart(stream, stream.count - held_out, stream.count)


@dataclass(frozen=True, slots=True)
class WindowSamples:
    """The windows of one or more corpora taken as one, in a new order every epoch.

    Attributes:
        parts: one per corpus.
        first_windows: of each part: how many windows the parts before it have.
        order: over all windows.
    """

    parts: tuple[StreamPart, ...]
    first_windows: tuple[int, ...]
    order: EpochOrder
    seq_len: int
    vocab: int

    @property
    def size(self) -> int:
        """Number of distinct samples: one epoch."""
        return self.order.size

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        ranges = [(part.stream.fingerprint, part.start, part.stop) for part in self.parts]
        named = f"windows 1 {self.seq_len} {self.order.seed} {self.order.name} {ranges}"
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def window(self, number: int) -> np.ndarray:
        """Window `number`, counted through the parts in their order: int64[seq_len + 1].

        Raises:
            DataError: a token lies outside the vocabulary.
        """
        which = bisect_right(self.first_windows, number) - 1
        part = self.parts[which]
        start = part.start + (number - self.first_windows[which]) * self.seq_len
        tokens = part.stream.read(start, start + self.seq_len + 1)
        check_tokens(tokens, self.vocab, name=part.stream.name, start=start)
        return tokens

    def rows(self, start: int, count: int) -> np.ndarray:
        """Samples start..start+count-1: int64[count, seq_len + 1]."""
        return np.stack([self.window(self.order.item(start + row)) for row in range(count)])


def window_samples(
    parts: tuple[StreamPart, ...], *, seq_len: int, vocab: int, seed: int, name: str
) -> WindowSamples:
    """Windows over the parts; `name` keys their order together with the seed."""
    ends = list(accumulate(part.windows(seq_len) for part in parts))
    order = EpochOrder(ends[-1], seed, name)
    return WindowSamples(parts, (0, *ends[:-1]), order, seq_len, vocab)


def check_tokens(tokens: np.ndarray, vocab: int, *, name: str, start: int = 0) -> None:
    """Raise DataError at a token outside 0..vocab-1; `start` is the position of `tokens`."""
    # one pass: seen as unsigned, a negative id is larger than any vocabulary
    wrong = tokens.view(np.uint64) >= vocab
    if wrong.any():
        position = int(np.argmax(wrong))
        token = int(tokens[position])
        advice = f"set model.vocab to at least {token + 1}, or " if token >= 0 else ""
        raise DataError(
            f"{name}: token {start + position} has id {token}, allowed are 0 to {vocab - 1} "
            f"(model.vocab = {vocab}); {advice}use data of another tokenizer"
        )
