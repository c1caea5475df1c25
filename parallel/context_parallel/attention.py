"""Causal attention of the slices of a sequence to themselves and to the slices before them.

Each slice is computed by itself: its queries with the keys of its own places, and with all keys
before them, joined. The gradients of a slice's keys and values are added in float32 (or wider) in
the order of the slices of queries, the last one first: the order in which slices go backward one
after another, as in TeraPipe (Li et al. 2021). So bits depend neither on what is computed in one
call nor on the ranks that do it. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.context_parallel.kernels import (
    Attended,
    attend,
    attend_backward,
    merge,
)
from holdfast.parallel.context_parallel.logits import Note, largest_logits
from holdfast.parallel.context_parallel.pieces import Piece, pieces_of
from holdfast.parallel.layout import Slices
from holdfast.parallel.pipeline import Documents


@dataclass(frozen=True, slots=True)
class Work:
    """The slices of a micro-batch's sequences, and the documents in these."""

    slices: Slices
    documents: Documents | None
    """Attention does not cross their ends; None: each sequence is one."""
    batch: int
    window: int = 0
    """The keys that a query sees, itself included; 0: all before it."""
    note: Note | None = None
    """None: logits are not asked for."""

    def pieces(self, number: int) -> Iterator[Piece]:
        """The pieces of a slice."""
        places = self.slices.tokens(number)
        return pieces_of(places.start, places.stop, self.documents, self.batch, self.window)

    def note_logits(self, number: int, query: Tensor, keys: Tensor) -> None:
        """Note the largest logits of a slice's queries, if they are asked for.

        Args:
            query, keys: as of `largest_logits`.
        """
        if self.note is not None:
            place, pieces = self.slices.tokens(number).start, self.pieces(number)
            self.note(number, partial(largest_logits, pieces, place, query, keys, self.window))

    def mask(self, piece: Piece, query: Tensor) -> Tensor | None:
        """The mask of a piece's keys, with a window; None: those up to a query's own are seen."""
        if piece.first == piece.start:
            return None
        places = torch.arange(piece.first, piece.stop, device=query.device)
        behind = torch.arange(piece.start, piece.stop, device=query.device)[:, None] - places
        hidden = (behind < 0) | (behind >= self.window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        return mask.masked_fill_(hidden, float("-inf"))


def sliced_attention(
    query: Sequence[Tensor], key: Sequence[Tensor], value: Sequence[Tensor], work: Work
) -> list[Tensor]:
    """Attention of all slices of a sequence, on this rank. Local.

    Args:
        query: of each slice, float[micro_batch, heads, length, head_dim], with positions applied.
        key, value: of each slice, float[micro_batch, kv_heads, length, head_dim].
    Returns:
        Of each slice, float[micro_batch, heads, length, head_dim].
    """
    return list(_SlicedAttention.apply(work, *query, *key, *value))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The slices of keys or values one after the other: [batch, heads, seq, head_dim]."""
    return torch.cat(list(parts), dim=2)


class _SlicedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = work.slices.count
        query, key, value = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        keys, values = joined(key), joined(value)
        found = [slice_forward(work, number, q, keys, values) for number, q in enumerate(query)]
        ctx.work = work
        ctx.save_for_backward(keys, values, *query, *(part for one in found for part in one))
        return tuple(one.output for one in found)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work, count = ctx.work, ctx.work.slices.count
        keys, values, *rest = ctx.saved_tensors
        query, found = rest[:count], rest[count:]
        sums = KeyGradients(keys, values)
        by_query: list[Tensor] = []
        for number in reversed(range(count)):
            attended = Attended(*found[2 * number : 2 * number + 2])
            by_query.append(
                slice_backward(work, number, gradients[number], query[number], attended, sums)
            )
        of_slices = (list(part.to(keys.dtype).chunk(count, dim=2)) for part in sums.both)
        return None, *reversed(by_query), *(part for parts in of_slices for part in parts)


def stacked(key: Sequence[Tensor], value: Sequence[Tensor]) -> Tensor:
    """The slices of keys and of values: [2, slices, batch, kv_heads, length, head_dim]."""
    return torch.stack([torch.stack(list(parts)) for parts in (key, value)])


def slice_forward(work: Work, number: int, query: Tensor, keys: Tensor, values: Tensor) -> Attended:
    """The attention of one slice."""
    place = work.slices.tokens(number).start
    work.note_logits(number, query, keys)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = query.dtype if query.element_size() >= 4 else torch.float32
    logsumexp = torch.empty(query.shape[:3], dtype=wide, device=query.device)
    for piece in work.pieces(number):
        own = query[piece.within(place)]
        if work.window:
            mask = work.mask(piece, own)
            seen = keys[piece.seen()], values[piece.seen()]
            found = attend(own, *seen, causal=mask is None, mask=mask)
        else:
            found = attend(own, keys[piece.queries], values[piece.queries], causal=True)
            if piece.first < piece.start:
                before = attend(own, keys[piece.before], values[piece.before], causal=False)
                found = merge(found, before)
        output[piece.within(place)] = found.output
        logsumexp[piece.within(place)] = found.logsumexp
    return Attended(output, logsumexp)


class KeyGradients:
    """The sums of the gradients by keys and values, float32 or wider, from zero on."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        wide = keys.dtype if keys.element_size() >= 4 else torch.float32
        self.both = tuple(
            torch.zeros(part.shape, dtype=wide, device=part.device) for part in (keys, values)
        )

    def add(
        self,
        gradient: Tensor,
        query: Tensor,
        attended: Attended,
        keys: tuple[int | slice, ...],
        *,
        causal: bool,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Add what some queries give to some keys. Returns the gradient by the queries."""
        found = attend_backward(
            gradient, query, self.keys[keys], self.values[keys], attended, causal=causal, mask=mask
        )
        for total, part in zip(self.both, (found.key, found.value), strict=True):
            total[keys] += part
        return found.query


def slice_backward(
    work: Work, number: int, gradient: Tensor, query: Tensor, found: Attended, sums: KeyGradients
) -> Tensor:
    """The gradient by the queries of one slice; those by keys and values are added to `sums`."""
    place = work.slices.tokens(number).start
    by_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Windows overlap: what the slice gives to a key is added up first, as where each slice's sums
    # travel by themselves.
    begin = max(0, place - work.window + 1) if work.window else 0
    span = (slice(None), slice(None), slice(begin, work.slices.tokens(number).stop))
    inner = KeyGradients(sums.keys[span], sums.values[span]) if work.window else sums
    for piece in work.pieces(number):
        here = piece.within(place)
        attended = Attended(found.output[here], found.logsumexp[here])
        by_queries = partial(inner.add, gradient[here], query[here], attended)
        if work.window:
            mask = work.mask(piece, query)
            total = by_queries(piece.seen(begin), causal=mask is None, mask=mask)
        else:
            total = by_queries(piece.queries, causal=True)
            if piece.first < piece.start:
                total = total + by_queries(piece.before, causal=False)
        by_query[here] = total
    if inner is not sums:
        for whole, part in zip(sums.both, inner.both, strict=True):
            whole[span] += part
    return by_query
