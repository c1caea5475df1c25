"""The largest logit of each head of attention, in blocks of queries and keys. Local.

Each matrix product is that of some tokens of one sequence with one key head, from memory of its
own, so that it has the same bits wherever heads and slices lie. It is of the queries' precision: a
largest logit is rounded as it would be in attention. The order does not matter to the largest of
several: exact-mode safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.parallel.context_parallel.pieces import Piece

Note = Callable[[int, Callable[[], Tensor]], None]
"""Called with the number of a slice, and with what gives the largest logit of each of its query
heads: float64[heads]."""
_TOKENS = 2048
"""Those of a block: so much memory is needed for each query head of a key head, squared."""


def largest_logits(
    pieces: Iterable[Piece], place: int, query: Tensor, keys: Tensor, window: int = 0
) -> Tensor:
    """The largest logit of each query head, over what some queries see: float64[heads].

    Args:
        pieces: of the slice of the queries; `place` is where it begins.
        query: float[micro_batch, heads, length, head_dim], with positions applied.
        keys: float[micro_batch, kv_heads, places from 0 on, head_dim].
        window: the keys that a query sees, itself included; 0: all before it.
    """
    heads, kv_heads, dim = query.shape[1], keys.shape[1], query.shape[-1]
    times = heads // kv_heads
    found = torch.full((kv_heads, times), -torch.inf, dtype=query.dtype, device=query.device)
    for piece in pieces:
        queries, seen = query[piece.within(place)], keys[piece.seen()]
        for block in _blocks(piece, window):
            hidden = block.hidden(piece, window, query.device)
            of_queries = queries[:, :, block.queries].unflatten(1, (kv_heads, times))
            of_keys = seen[:, :, block.keys]
            for row, head in product(range(len(queries)), range(kv_heads)):
                left, right = (
                    part[row, head].clone(memory_format=torch.contiguous_format).view(-1, dim)
                    for part in (of_queries, of_keys)
                )
                logits = (left @ right.t()).unflatten(0, (times, -1))
                if hidden is not None:
                    logits.masked_fill_(hidden, -torch.inf)
                found[head] = torch.maximum(found[head], logits.amax((1, 2)))
    return found.flatten().double() / math.sqrt(dim)


class _Block(NamedTuple):
    """Some queries of a piece and some of the keys that it sees, by their places in these."""

    queries: slice
    keys: slice

    def hidden(self, piece: Piece, window: int, device: torch.device) -> Tensor | None:
        """The keys that a query does not see: bool[queries, keys]. None: it sees all of them."""
        first, stop = piece.start + self.queries.start, piece.start + self.queries.stop
        begin, end = piece.first + self.keys.start, piece.first + self.keys.stop
        if end <= first + 1 and (not window or stop - begin <= window):
            return None
        behind = torch.arange(first, stop, device=device)[:, None] - torch.arange(
            begin, end, device=device
        )
        return (behind < 0) | (behind >= window) if window else behind < 0


def _blocks(piece: Piece, window: int) -> Iterator[_Block]:
    """The blocks of a piece in which some query sees some key. Pure."""
    before = piece.start - piece.first
    for first in range(0, piece.stop - piece.start, _TOKENS):
        stop = min(first + _TOKENS, piece.stop - piece.start)
        least = max(0, before + first - window + 1) if window else 0
        for begin in range(least, before + stop, _TOKENS):
            keys = slice(begin, min(begin + _TOKENS, before + stop))
            yield _Block(slice(first, stop), keys)
