"""Context parallelism: attention of slices that the ranks of a context group have between them.

Either ranks exchange slices for heads before attention and back after it (all-to-all; Jacobs et al.
2023, Ulysses), so that each has all slices of some heads; or each gathers the keys and values of
all slices, again in the backward pass, and sends their gradients to the ranks that have the slices
(all-gather; Dubey et al. 2024). Either way every slice of every head is computed as one rank alone
would do it, with the same bits: exact-mode safe. In fast mode keys may go round a ring instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator
from holdfast.parallel.context_parallel.attention import (
    KeyGradients,
    Work,
    joined,
    slice_backward,
    slice_forward,
    sliced_attention,
    stacked,
)
from holdfast.parallel.context_parallel.kernels import Attended
from holdfast.parallel.context_parallel.logits import Note
from holdfast.parallel.context_parallel.ring import ring_attention
from holdfast.parallel.context_parallel.stretches import stretch_attention
from holdfast.parallel.layout import Slices
from holdfast.parallel.pipeline import Documents

ContextExchange = Literal["heads", "keys", "ring"]
"""What the ranks of a context group exchange: slices for heads, keys and values all at once, or
those of one rank at a time."""


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """The split of sequences between ranks: the group (None: one rank), and its exchange."""

    group: Communicator | None
    exchange: ContextExchange

    def attend(
        self,
        query: Sequence[Tensor],
        key: Sequence[Tensor],
        value: Sequence[Tensor],
        slices: Slices,
        documents: Documents | None,
        kept: dict[object, Any],
        name: object,
        window: int = 0,
        note: Note | None = None,
    ) -> list[Tensor]:
        """Attention of this rank's slices. Collective over the group.

        Args:
            query: of each own slice, float[micro_batch, heads, length, head_dim], with positions
                applied. To exchange heads, their number is a multiple of the group's size.
            key, value: likewise, with kv_heads. Where their number is no multiple of the number of
                slices, each head gets a copy: so its gradients are added in one order, whatever
                ranks the heads of a group lie on.
            kept, name: for a stretch of sequences, what is kept between them, and the name under
                which this attention keeps it.
            window: the keys that a query sees, itself included; 0: all before it. It goes with
                every exchange but the ring.
            note: called for each own slice, and not by the ring; None: logits are not asked for.
        Returns:
            Of each own slice, float[micro_batch, heads, length, head_dim].
        """
        work = Work(slices, documents, query[0].shape[0], window, note)
        if self.group is not None and self.exchange == "ring":
            return ring_attention(query, key, value, work, self.group)
        heads, kv_heads = query[0].shape[1], key[0].shape[1]
        if kv_heads % slices.count:
            key, value = (
                [_RepeatedHeads.apply(part, heads // kv_heads) for part in parts]
                for parts in (key, value)
            )
        attention = sliced_attention
        if slices.only is not None:
            assert self.group is None or self.exchange == "heads"  # the configuration says so
            attention = partial(stretch_attention, kept=kept, name=name)
        if self.group is None:
            return attention(query, key, value, work)
        if self.exchange == "keys":
            return list(_GatheredAttention.apply(work, self.group, *query, *key, *value))
        return _by_heads(query, key, value, work, self.group, attention)


class _RepeatedHeads(torch.autograd.Function):
    """Each key and value head as often as there are heads that use it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, times: int) -> Tensor:
        ctx.times = times
        return value.repeat_interleave(times, dim=1)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wide = gradient if gradient.element_size() >= 4 else gradient.float()
        first, *others = wide.unflatten(1, (-1, ctx.times)).unbind(2)
        total = first.clone()
        for other in others:
            total += other
        return total.to(gradient.dtype), None


def _by_heads(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    work: Work,
    group: Communicator,
    attention: Callable[..., list[Tensor]],
) -> list[Tensor]:
    """Attention of all slices of this rank's part of the heads, between two exchanges."""
    size, slices = group.size, work.slices
    heads, kv_heads = query[0].shape[1] // size, key[0].shape[1] // size
    # By rank: its queries, keys and values, so that one exchange brings all of them.
    grouped = [
        torch.cat([x.chunk(size, dim=1)[rank] for rank in range(size) for x in own], dim=1)
        for own in zip(query, key, value, strict=True)
    ]
    of_heads = _SlicesToHeads.apply(slices, group, *grouped)
    split = [part.split([heads, kv_heads, kv_heads], dim=1) for part in of_heads]
    q, k, v = zip(*split, strict=True)
    logits: dict[int, Tensor] = {}
    asked = None if work.note is None else partial(_keep, logits)
    mixed = attention(q, k, v, replace(work, slices=slices.whole(), note=asked))
    if work.note is not None:
        _note_all_heads(logits, work.slices, group, work.note)
    return list(_HeadsToSlices.apply(slices, group, *mixed))


def _keep(logits: dict[int, Tensor], number: int, largest: Callable[[], Tensor]) -> None:
    logits[number] = largest()


def _note_all_heads(
    logits: Mapping[int, Tensor], slices: Slices, group: Communicator, note: Note
) -> None:
    """Note the largest logits of all heads of the own slices. Collective over the group.

    Args:
        logits: of this rank's heads of all slices, by slice.
    """
    mine = torch.stack([logits[number] for number in slices.numbers])
    received = [torch.empty_like(mine) for _ in range(group.size)]
    group.all_gather(received, mine).wait()
    for number in slices.own:
        place = slices.numbers.index(number)
        note(number, partial(torch.cat, [part[place] for part in received]))


def _to_heads(slices: Slices, group: Communicator, own: Sequence[Tensor]) -> list[Tensor]:
    """All slices of this rank's part of the heads, from all heads of its own slices. Collective.

    Args:
        own: of each own slice, [batch, size times heads, length, head_dim].
    Returns:
        Of each slice, [batch, heads, length, head_dim].
    """
    sent = [
        torch.stack([part.chunk(group.size, dim=1)[rank] for part in own])
        for rank in range(group.size)
    ]
    received = [
        sent[0].new_empty(len(slices.of(rank)), *sent[0].shape[1:]) for rank in range(group.size)
    ]
    group.all_to_all(received, sent).wait()
    parts = [iter(part) for part in received]
    return [next(parts[slices.owners[number]]) for number in slices.numbers]


def _to_slices(slices: Slices, group: Communicator, of_heads: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_to_heads`. Collective."""
    sent = [
        torch.stack([of_heads[slices.numbers.index(number)] for number in slices.of(rank)])
        for rank in range(group.size)
    ]
    received = [torch.empty_like(sent[group.index]) for _ in range(group.size)]
    group.all_to_all(received, sent).wait()
    return list(torch.cat(received, dim=2))


class _SlicesToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slices: Slices, group: Communicator, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.slices, ctx.group = slices, group
        return tuple(_to_heads(slices, group, own))

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_to_slices(ctx.slices, ctx.group, gradients)


class _HeadsToSlices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slices: Slices, group: Communicator, *of_heads: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.slices, ctx.group = slices, group
        return tuple(_to_slices(slices, group, of_heads))

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_to_heads(ctx.slices, ctx.group, gradients)


def _gathered(
    slices: Slices, group: Communicator, key: Sequence[Tensor], value: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The keys and values of all slices: [batch, kv_heads, seq, head_dim] each. Collective."""
    mine = stacked(key, value)
    received = [
        mine.new_empty(2, len(slices.of(rank)), *mine.shape[2:]) for rank in range(group.size)
    ]
    group.all_gather(received, mine).wait()

    def in_order(kind: int) -> Tensor:
        parts = [iter(part[kind]) for part in received]
        return joined([next(parts[owner]) for owner in slices.owners])

    return in_order(0), in_order(1)


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, group: Communicator, *tensors: Tensor) -> tuple[Tensor, ...]:
        own = work.slices.own
        query, key, value = (tensors[n * len(own) : (n + 1) * len(own)] for n in range(3))
        keys, values = _gathered(work.slices, group, key, value)
        found = [
            slice_forward(work, number, q, keys, values)
            for number, q in zip(own, query, strict=True)
        ]
        ctx.work, ctx.group = work, group
        ctx.save_for_backward(*tensors, *(part for one in found for part in one))
        return tuple(one.output for one in found)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work, group, own = ctx.work, ctx.group, ctx.work.slices.own
        count = len(own)
        saved = ctx.saved_tensors  # recomputed ones may be asked for once
        query, key, value = (saved[n * count : (n + 1) * count] for n in range(3))
        found = saved[3 * count :]
        keys, values = _gathered(work.slices, group, key, value)
        by_query: list[Tensor] = []
        of_queries: dict[int, tuple[Tensor, ...]] = {}
        for place in reversed(range(count)):
            sums = KeyGradients(keys, values)
            attended = Attended(*found[2 * place : 2 * place + 2])
            by_query.append(
                slice_backward(work, own[place], gradients[place], query[place], attended, sums)
            )
            of_queries[own[place]] = tuple(sums.both)
        by_key, by_value = _summed(work.slices, group, of_queries)
        narrow = ([part.to(keys.dtype) for part in parts] for parts in (by_key, by_value))
        return None, None, *reversed(by_query), *(part for parts in narrow for part in parts)


def _summed(
    slices: Slices, group: Communicator, of_queries: dict[int, tuple[Tensor, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of this rank's keys and values, of each own slice. Collective.

    Args:
        of_queries: what the queries of each own slice give to all keys and to all values,
            [batch, kv_heads, seq, head_dim] each.
    """

    def pairs(queries: int, keys: int) -> list[tuple[int, int]]:
        """What the queries of one rank give to the keys of another, in the order of adding."""
        return [
            (later, slice_)
            for later in reversed(slices.of(queries))
            for slice_ in slices.of(keys)
            if slice_ <= later
        ]

    one = next(iter(of_queries.values()))[0][:, :, slices.tokens(0)]

    def part(later: int, slice_: int) -> Tensor:
        places = slices.tokens(slice_)
        return torch.stack([both[:, :, places] for both in of_queries[later]])

    def message(given: Sequence[tuple[int, int]]) -> Tensor:
        parts = [part(*pair) for pair in given]
        return torch.stack(parts) if parts else one.new_empty(0, 2, *one.shape)

    sent = [message(pairs(group.index, rank)) for rank in range(group.size)]
    received = [
        one.new_empty(len(pairs(rank, group.index)), 2, *one.shape) for rank in range(group.size)
    ]
    group.all_to_all(received, sent).wait()
    arrived = {
        pair: given
        for rank in range(group.size)
        for pair, given in zip(pairs(rank, group.index), received[rank], strict=True)
    }
    totals = []
    for slice_ in slices.own:
        total = one.new_zeros(2, *one.shape)
        for later in reversed(range(slice_, slices.count)):
            total += arrived[later, slice_]
        totals.append(total)
    return [total[0] for total in totals], [total[1] for total in totals]
