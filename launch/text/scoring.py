"""The loss of a model on text, each token counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.launch.text.opening import TextForm, TextModel
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.pipeline import Batch, Documents, MicroBatchContext

_NOTHING = -1
"""The target where no token counts."""


@dataclass(frozen=True, slots=True)
class Score:
    """The loss on some text."""

    name: str
    loss: float
    """The mean loss of a token, in nats."""
    tokens: int
    """The tokens that were predicted."""
    bytes: int | None
    """The bytes of text that they stand for; None: not known."""

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return _exp(self.loss)

    @property
    def nats_per_byte(self) -> float | None:
        return self.loss * self.tokens / self.bytes if self.bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        nats = self.nats_per_byte
        return None if nats is None else nats / math.log(2)

    def as_dict(self) -> dict[str, Any]:
        """The score for JSON."""
        nats = self.nats_per_byte
        return {
            "name": self.name,
            "loss": self.loss,
            "loss_hex": self.loss.hex(),
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bits_per_byte": self.bits_per_byte,
            "perplexity_per_byte": None if nats is None else _exp(nats),
        }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that pass the model at once: those at the places [begin, last) predict the next ones.

    Of the predicted tokens, at the places (begin, last], those from `first` on count.
    """

    begin: int
    first: int
    last: int


def windows(count: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of a text of `count` tokens: each but the first token counts in one. Pure.

    Args:
        context: the most tokens of a window.
        stride: the tokens that count in a window, the first window aside: from 1 to `context`. A
            token that counts has at least `context` - `stride` + 1 tokens before it, where there
            are as many.
    """
    first, last = 1, min(count - 1, context)
    while first <= last:
        yield Window(max(0, last - context), first, last)
        first, last = last + 1, min(count - 1, last + stride)


def text_score(
    model: TextModel,
    form: TextForm,
    name: str,
    documents: Iterable[bytes],
    *,
    context: int,
    stride: int,
    together: int,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Score:
    """The loss of a model on documents. Local.

    Each document stands behind the token that stands before texts, so that its first token counts,
    too; where that token is not known, the first token and its bytes do not count.

    Args:
        documents: UTF-8 texts.
        context, stride: as of `windows`.
        together: the windows that are computed at once.
        progress: called with the bytes that are done, after each document.
    Raises:
        ConfigError: no token is predicted, or a document has one that the model lacks.
    """
    total, tokens, counted_bytes, read_bytes = 0.0, 0, 0, 0
    for document in documents:
        ids, first_bytes = form.tokenizer.encode_plainly(document.decode())
        if ids and max(ids) >= model.section.vocab:
            raise ConfigError(
                f"{name}: its tokenizer gives token {max(ids)}, and the model knows tokens 0 to "
                f"{model.section.vocab - 1}; it is the tokenizer of another model"
            )
        if form.before is None:
            counted_bytes -= first_bytes
        else:
            ids = [form.before, *ids]
        found = list(windows(len(ids), context, stride))
        for place in range(0, len(found), together):
            total += _loss_sum(model, ids, found[place : place + together])
        tokens += max(0, len(ids) - 1)
        counted_bytes += len(document)
        read_bytes += len(document)
        progress(read_bytes, None)
    if not tokens:
        raise ConfigError(f"{name}: no token of it is predicted from others; give a longer text")
    return Score(name, total / tokens, tokens, counted_bytes)


@torch.no_grad()
def _loss_sum(model: TextModel, ids: Sequence[int], some: Sequence[Window]) -> float:
    """The sum of the losses that count in some windows."""
    length = max(one.last - one.begin for one in some)
    tokens = torch.zeros(len(some), length, dtype=torch.int64)
    targets = torch.full((len(some), length), _NOTHING)
    for row, one in enumerate(some):
        here = torch.tensor(ids[one.begin : one.last + 1])
        tokens[row, : len(here) - 1] = here[:-1]
        place = one.first - one.begin - 1
        targets[row, place : len(here) - 1] = here[place + 1 :]
    documents = Documents.of([length] * len(some), len(some))
    batch = Batch(tokens, targets, documents).to(model.device)
    return float(model.chunk(None, MicroBatchContext(0, 0, False, batch)))
