"""Fill-in-the-middle: documents with their middle moved to the end (Bavarian et al. 2022).

It is done to windows of text (the paper's context level): each document in a window is cut at two
places, drawn uniformly, into prefix, middle and suffix, and becomes, with the special tokens of
each part before it,

    prefix-token prefix suffix-token suffix middle-token middle      (PSM)
    prefix-token suffix-token suffix middle-token prefix middle      (SPM)

What no longer fits into the window is cut off at its end. Every draw is a function of (seed,
sample, document), so no rank and no layout matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from holdfast import _native
from holdfast.parallel.errors import DataError
from holdfast.parallel.keyed_random import stream_key
from holdfast.trainer.config import DataConfig
from holdfast.trainer.data.corpora import FileTokenizer, load_tokenizer
from holdfast.trainer.data.dataset import Sequences
from holdfast.trainer.data.windows import WindowSamples

_BITS = 53
_DRAWS = 4
"""Of a document: whether it is changed, in which order, and the two places."""


class Draws(NamedTuple):
    """The draws of one document, each in [0, 1)."""

    changed: float
    order: float
    first: float
    second: float


@dataclass(frozen=True, slots=True)
class FillInMiddle:
    """The rule by which documents are changed."""

    rate: float
    """The share of documents that are changed."""
    spm_rate: float
    """The share of these that have the suffix first."""
    tokens: tuple[int, int, int]
    """The tokens before prefix, suffix and middle."""
    tokenizer: FileTokenizer

    def changed(self, document: np.ndarray, draws: Draws) -> np.ndarray:
        """A document, int64[tokens], changed or as it is. A last separator stays last. Pure."""
        if draws.changed >= self.rate:
            return document
        ends = document[-1:] if self._ends(document) else document[:0]
        body = document[: len(document) - len(ends)]
        before, within, after = self.parts(body, draws)
        prefix, suffix, middle = ([token] for token in self.tokens)
        if draws.order < self.spm_rate:
            order = (prefix, suffix, after, middle, before, within)
        else:
            order = (prefix, before, suffix, after, middle, within)
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in (*order, ends)])

    def parts(self, body: np.ndarray, draws: Draws) -> tuple[Sequence[int], ...]:
        """The tokens of prefix, middle and suffix.

        The text is cut between characters, and its parts are tokenised anew, so that a model learns
        to begin within what would be one token. Where that does not give the same text (a window
        may begin within a character), it is cut between tokens. Pure.
        """
        ids = body.tolist()
        text = self.tokenizer.text(ids)
        first, second = _places(len(text), draws)
        cut = [text[:first], text[first:second], text[second:]]
        encoded = [part.tolist() for part in self.tokenizer.encode([c.encode() for c in cut])]
        whole = self.tokenizer.encode([text.encode()])[0].tolist()
        if whole == ids and list(map(self.tokenizer.text, encoded)) == cut:
            return tuple(encoded)
        first, second = _places(len(ids), draws)
        return ids[:first], ids[first:second], ids[second:]

    def _ends(self, document: np.ndarray) -> bool:
        return bool(len(document)) and document[-1] == self.tokenizer.separator


def _places(length: int, draws: Draws) -> tuple[int, int]:
    """Two places in a text of this length, each of 0 to `length` equally likely, ascending."""
    first, second = sorted(int(draw * (length + 1)) for draw in draws[2:])
    return first, second


@dataclass(frozen=True, slots=True)
class FillInMiddleSamples:
    """Windows whose documents are changed by a rule.

    Attributes:
        source: the windows, with the places where documents begin.
    """

    source: WindowSamples
    rule: FillInMiddle

    @property
    def size(self) -> int:
        """Number of distinct windows: one epoch, in each of which they are cut elsewhere."""
        return self.source.size

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        rule = self.rule
        named = (
            f"fill in the middle 1 {rule.rate} {rule.spm_rate} {rule.tokens} "
            f"{rule.tokenizer.fingerprint} {self.source.fingerprint}"
        )
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        rows = np.stack([self._window(start + row) for row in range(count)])
        return Sequences(rows[:, :-1].copy(), rows[:, 1:].copy())

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The windows of samples start..start+count-1."""
        return self.source.numbers(start, count)

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples."""
        return count * self.source.seq_len

    def _window(self, index: int) -> np.ndarray:
        """The changed tokens of sample `index`: int64[seq_len + 1]."""
        tokens, begun = self.source.read(self.source.order.item(index))
        edges = np.unique([0, *begun, len(tokens)]).tolist()
        drawn = self.draws(index, len(edges) - 1)
        documents = [
            self.rule.changed(tokens[start:stop], draws)
            for (start, stop), draws in zip(pairwise(edges), drawn, strict=True)
        ]
        return np.concatenate(documents)[: len(tokens)]

    def draws(self, index: int, documents: int) -> list[Draws]:
        """The draws of the documents of sample `index`."""
        order = self.source.order
        key = stream_key(order.seed, "fill in the middle", order.name, index).key
        found = np.empty(_DRAWS * documents, dtype=np.int64)
        _native.permute_indices(found.ctypes.data, 0, len(found), 2**_BITS, key)
        rows = (found / 2**_BITS).reshape(documents, _DRAWS).tolist()
        return [Draws(*row) for row in rows]


def fill_in_middle(data: DataConfig) -> FillInMiddle:
    """The rule of a configuration's data. It reads the tokenizer's file.

    Raises:
        DataError: the tokenizer is bad, or has no such tokens.
    """
    tokenizer = load_tokenizer(data.tokenizer, end_of_text=data.end_of_text)
    assert isinstance(tokenizer, FileTokenizer)  # the section's rules say so
    ids = []
    for name in data.fim_tokens:
        found = tokenizer.model.token_to_id(name)
        if found is None:
            raise DataError(
                f'data.fim_tokens: data.tokenizer = "{data.tokenizer}" has no token {name!r}; name '
                "three of its tokens as the file writes them"
            )
        ids.append(found)
    prefix, suffix, middle = ids
    return FillInMiddle(data.fim_rate, data.fim_spm_rate, (prefix, suffix, middle), tokenizer)
