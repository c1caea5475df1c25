"""Ring attention: keys and values go round the context group, one rank's at a time.

While queries attend to the keys that are here, the next arrive (Liu et al. 2023); backwards, the
sums of their gradients follow them round. No rank ever has all keys, and what it sends does not
grow with its number of slices. Parts of the keys are joined in another order on each number of
ranks: not exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator, Handle
from holdfast.parallel.context_parallel.attention import KeyGradients, Work, stacked
from holdfast.parallel.context_parallel.kernels import Attended, attend, merge
from holdfast.parallel.context_parallel.pieces import Index


def ring_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    work: Work,
    group: Communicator,
) -> list[Tensor]:
    """Attention of this rank's slices, as of `sliced_attention`. Collective over the group."""
    return list(_RingAttention.apply(work, group, *query, *key, *value))


class _Part(NamedTuple):
    """Queries of a slice that attend to keys of a slice."""

    queries: Index
    """In the queries' slice."""
    keys: Index
    """In the keys' slice."""
    causal: bool
    """Whether each query attends to the keys up to its own place only, or to all."""


def parts_of(work: Work, queries: int, keys: int) -> Iterator[_Part]:
    """What the queries of one slice attend to in another."""
    here, there = work.slices.tokens(queries), work.slices.tokens(keys)
    for piece in work.pieces(queries) if keys <= queries else ():
        own = piece.within(here.start)
        if keys == queries:
            yield _Part(own, own, causal=True)
        elif piece.first < there.stop:
            first = max(piece.first, there.start) - there.start
            yield _Part(own, (piece.rows, slice(None), slice(first, None)), causal=False)


@dataclass(slots=True)
class _Ring:
    """The messages from each rank of a group to the next."""

    group: Communicator

    def pass_on(self, sent: Tensor, received: Tensor) -> Handle:
        """Send to the next rank, and receive from the one before."""
        size, index, none = self.group.size, self.group.index, sent.new_empty(0)
        to, source = (index + 1) % size, (index - 1) % size
        return self.group.all_to_all(
            [received if member == source else none for member in range(size)],
            [sent if member == to else none for member in range(size)],
        )

    def rounds(self, own: Tensor, work: Work) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each rank's slices and their keys and values, its own first; the next are on the way.

        Args:
            own: [2, own slices, batch, kv_heads, length, head_dim]; each rank has as many.
        """
        size, held = self.group.size, self.group.index
        for _ in range(size - 1):
            arriving = torch.empty_like(own)
            handle = self.pass_on(own, arriving)
            yield work.slices.of(held), own
            handle.wait()
            held, own = (held - 1) % size, arriving
        yield work.slices.of(held), own


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, group: Communicator, *tensors: Tensor) -> tuple[Tensor, ...]:
        own = work.slices.own
        query, key, value = (tensors[n * len(own) : (n + 1) * len(own)] for n in range(3))
        found: list[Attended | None] = [None] * len(own)
        for numbers, both in _Ring(group).rounds(stacked(key, value), work):
            for place, number in enumerate(own):
                # Its own first: no query has none of them.
                for other, keys, values in reversed(list(zip(numbers, *both, strict=True))):
                    found[place] = _attended(
                        work, (number, other), query[place], keys, values, found[place]
                    )
        whole = [Attended(one.output.to(query[0].dtype), one.logsumexp) for one in found if one]
        ctx.work, ctx.group = work, group
        ctx.save_for_backward(*tensors, *(part for one in whole for part in one))
        return tuple(one.output for one in whole)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work, ring, own = ctx.work, _Ring(ctx.group), ctx.work.slices.own
        saved = ctx.saved_tensors  # recomputed ones may be asked for once
        query, key, value = (saved[n * len(own) : (n + 1) * len(own)] for n in range(3))
        found = [Attended(*saved[n : n + 2]) for n in range(3 * len(own), len(saved), 2)]
        own_keys = stacked(key, value)
        total, arriving = torch.zeros_like(own_keys, dtype=found[0].logsumexp.dtype), None
        by_query = [torch.zeros_like(part, dtype=total.dtype) for part in query]
        for numbers, both in ring.rounds(own_keys, work):
            sums = KeyGradients(*both)
            for (place, number), (at, other) in product(enumerate(own), enumerate(numbers)):
                for part in parts_of(work, number, other):
                    by_query[place][part.queries] += sums.add(
                        gradients[place][part.queries],
                        query[place][part.queries],
                        Attended(*(one[part.queries] for one in found[place])),
                        (at, *part.keys),
                        causal=part.causal,
                    )
            if arriving is not None:
                arriving.wait()
            given = torch.stack(sums.both).add_(total)
            total = torch.empty_like(given)
            arriving = ring.pass_on(given, total)
        assert arriving is not None
        arriving.wait()
        narrow = [part.to(own_keys.dtype) for part in (*by_query, *total[0], *total[1])]
        return None, None, *narrow


def _attended(
    work: Work,
    numbers: tuple[int, int],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Attended | None,
) -> Attended | None:
    """The attention of a slice's queries to another's keys too.

    Args:
        numbers: the slice of the queries, and that of the keys.
        before: to the keys that were here before; overwritten. Its first are the slice's own, which
            each query attends to.
    """
    for part in parts_of(work, *numbers):
        found = attend(query[part.queries], keys[part.keys], values[part.keys], causal=part.causal)
        found = Attended(found.output.to(found.logsumexp.dtype), found.logsumexp)
        if before is None:
            before = Attended(
                torch.empty_like(query, dtype=found.output.dtype),
                torch.empty(query.shape[:3], dtype=found.logsumexp.dtype, device=query.device),
            )
        if not part.causal:
            earlier = Attended(*(one[part.queries] for one in before))
            found = merge(earlier, found)
        for one, of_part in zip(before, found, strict=True):
            one[part.queries] = of_part
    return before
