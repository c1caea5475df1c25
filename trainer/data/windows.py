"""Samples cut from token streams: windows of seq_len + 1 tokens at a stride of seq_len."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise

import numpy as np

from holdfast.parallel.errors import DataError, unknown_name
from holdfast.trainer.data.corpora import DocumentStarts, TokenStream
from holdfast.trainer.data.dataset import NOTHING, Sequences
from holdfast.trainer.data.permutation import EpochOrder


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
        starts: of each part, where documents begin; empty: documents do not matter.
    """

    parts: tuple[StreamPart, ...]
    first_windows: tuple[int, ...]
    order: EpochOrder
    seq_len: int
    vocab: int
    starts: tuple[DocumentStarts, ...]

    @property
    def size(self) -> int:
        """Number of distinct samples: one epoch."""
        return self.order.size

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        ranges = [(part.stream.fingerprint, part.start, part.stop) for part in self.parts]
        named = f"windows 1 {self.seq_len} {self.order.seed} {self.order.name} {ranges}"
        if self.starts:
            named += f" documents 1 {[starts.fingerprint for starts in self.starts]}"
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of window `number`, counted through the parts in their order.

        Returns:
            int64[seq_len + 1], and the places but the first where documents begin: int64[...]; none
            if these do not matter.
        Raises:
            DataError: a token lies outside the vocabulary.
        """
        which = bisect_right(self.first_windows, number) - 1
        part = self.parts[which]
        start = part.start + (number - self.first_windows[which]) * self.seq_len
        read = part.stream.read(start, start + self.seq_len + 1)
        check_tokens(read, self.vocab, name=part.stream.name, start=start)
        if not self.starts:
            return read, np.empty(0, dtype=np.int64)
        return read, self.starts[which].within(start + 1, start + self.seq_len + 1) - start

    def window(self, number: int) -> Sequences:
        """Window `number` as a training sequence; see `read`."""
        read, begun = self.read(number)
        tokens, targets = read[None, :-1], read[None, 1:]
        if not self.starts:
            return Sequences(tokens, targets)
        # The first token of a document is not predicted from the one before.
        targets = targets.copy()
        targets[0, begun - 1] = NOTHING
        edges = [0, *begun[begun < self.seq_len].tolist(), self.seq_len]
        return Sequences(tokens, targets, (tuple(b - a for a, b in pairwise(edges)),))

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        numbers = self.order.items(start, count).tolist()
        return Sequences.joined([self.window(number) for number in numbers])

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The windows of samples start..start+count-1, counted through the parts."""
        return self.order.items(start, count)

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples; no token is read."""
        total = count * self.seq_len
        if not self.starts:
            return total
        numbers = self.order.items(start, count)
        which = np.searchsorted(self.first_windows, numbers, side="right") - 1
        for index, (part, starts) in enumerate(zip(self.parts, self.starts, strict=True)):
            own = numbers[which == index] - self.first_windows[index]
            first = part.start + own * self.seq_len
            before = starts.counts_before(np.stack([first + 1, first + self.seq_len + 1]))
            total -= int((before[1] - before[0]).sum())
        return total


def window_samples(
    parts: tuple[StreamPart, ...],
    *,
    seq_len: int,
    vocab: int,
    seed: int,
    name: str,
    by_document: bool = False,
) -> WindowSamples:
    """Windows over the parts.

    Args:
        name: keys their order together with the seed.
        by_document: whether documents matter: none is predicted from the one before it.
    """
    ends = list(accumulate(part.windows(seq_len) for part in parts))
    order = EpochOrder(ends[-1], seed, name)
    starts = tuple(part.stream.documents for part in parts) if by_document else ()
    return WindowSamples(parts, (0, *ends[:-1]), order, seq_len, vocab, starts)


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
