"""The continuation of texts, token by token, with the keys and values of earlier tokens kept.

A sequence passes the model as stretches do in training: the prompt in a few slices, then each new
token as a slice of its own. So keys and values are kept by the same code, for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.launch.text.sampling import Sampling, choose
from holdfast.parallel.layout import Slices
from holdfast.parallel.pipeline import Batch, Chunk, MicroBatchContext

MOST_TOGETHER = 16
"""The most samples of a prompt that are computed at once."""
End = Literal["text", "tokens", "context"]
"""What ended a text: the token that ends texts, the number of tokens asked for, or the longest
sequence of the model."""


@dataclass(slots=True)
class Continuation:
    """One continuation of a prompt."""

    sample: int
    tokens: list[int] = field(default_factory=list)
    """The new tokens, without one that ends the text."""
    end: End | None = None
    """None: it is not at its end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a text, and what may be in it."""

    tokens: int
    """The most new tokens."""
    context: int
    """The longest sequence of the model, in tokens."""
    ends: frozenset[int]
    """The tokens that end a text."""
    vocab: int
    """The number of tokens that the tokenizer has: others are never chosen."""


class Decoder:
    """The scores of the next token of sequences that grow together. Local."""

    def __init__(
        self, chunk: Chunk, batch: int, room: int, kv_heads: int, device: torch.device
    ) -> None:
        """Nothing is computed yet.

        Args:
            chunk: a whole model.
            batch: the number of sequences.
            room: the most tokens of each.
            kv_heads: the key and value heads of a layer.
        """
        self._modules = [module for _, module in chunk.modules_by_layer()]
        self._tokens = torch.zeros(batch, room, dtype=torch.int64, device=device)
        # Heads that slices do not divide are kept one by one: all passes have more slices than
        # there are heads, so that all keep them alike.
        self._longest = 1 << max(0, (room // (kv_heads + 1)).bit_length() - 1)
        self._kept: dict[object, Any] = {}
        self.length = 0
        """The tokens of each sequence so far."""

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens, int64[batch, count]. Returns the scores of the next: float[batch, vocab].

        Raises:
            ValueError: there is no room for them.
        """
        start, stop = self.length, self.length + tokens.shape[1]
        if not start < stop <= self._tokens.shape[1]:
            raise ValueError(f"no room for {stop - start} tokens after {start}")
        self._tokens[:, start:stop] = tokens
        last: Tensor | None = None
        for slices in self._passes(start, stop):
            last = self._pass(slices)
        self.length = stop
        assert last is not None
        *_, head = self._modules
        (scores,) = head.logits(last[-1:])  # pyrefly: ignore[not-callable]
        return scores[0]

    def _passes(self, start: int, stop: int) -> Iterator[Slices]:
        """The slices of the places [start, stop): each begins at a multiple of its length."""
        room = self._tokens.shape[1]
        length = self._longest
        while start < stop:
            while start % length or stop - start < length:
                length //= 2
            count = (stop - start) // length if length == self._longest else 1
            first = start // length
            yield Slices(length, (0,) * (room // length + 1), only=range(first, first + count))
            start += count * length
            length = self._longest

    def _pass(self, slices: Slices) -> Tensor:
        """What the last layer below the head gives of the last slice: float[length, batch, …]."""
        batch = Batch(self._tokens, self._tokens)
        context = MicroBatchContext(0, 0, False, batch, slices=slices, kept=self._kept)
        values: list[Tensor] | None = None
        for module in self._modules[:-1]:
            values = module(values, context)
        assert values is not None
        return values[-1]


def continued(
    chunk: Chunk,
    kv_heads: int,
    device: torch.device,
    prompt: Sequence[int],
    samples: Sequence[int],
    sampling: Sampling,
    limits: Limits,
    heard: Callable[[int, int], None] = lambda sample, token: None,
) -> list[Continuation]:
    """Continue a prompt once for each number in `samples`. Local.

    Args:
        chunk: a whole model, with rotary tables for `limits.context` tokens.
        prompt: one token or more, fewer than `limits.context`.
        heard: called with (sample, token) as soon as a token is chosen.
    """
    found = [Continuation(sample) for sample in samples]
    room = min(limits.context, len(prompt) + limits.tokens)
    decoder = Decoder(chunk, len(samples), room, kv_heads, device)
    scores = decoder.extend(torch.tensor([list(prompt)] * len(samples), device=device))
    while True:
        scores = scores.float().cpu()
        scores[:, limits.vocab :] = float("-inf")
        chosen = [
            _next(one, row, decoder.length, sampling)
            for one, row in zip(found, scores, strict=True)
        ]
        for one, token in zip(found, chosen, strict=True):
            _take(one, token, decoder.length, limits, heard)
        if all(one.end for one in found):
            return found
        scores = decoder.extend(torch.tensor(chosen, device=device).unsqueeze(1))


def _next(one: Continuation, scores: Tensor, position: int, sampling: Sampling) -> int:
    return 0 if one.end else choose(scores, sampling, one.sample, position)


def _take(
    one: Continuation,
    token: int,
    position: int,
    limits: Limits,
    heard: Callable[[int, int], None],
) -> None:
    """Append a chosen token to a text that is not at its end, or end it."""
    if one.end:
        return
    if token in limits.ends:
        one.end = "text"
        return
    one.tokens.append(token)
    heard(one.sample, token)
    if len(one.tokens) == limits.tokens:
        one.end = "tokens"
    elif position + 1 == limits.context:
        one.end = "context"
