"""The way of tokens to their experts and back, over the ranks that have these.

A *piece of work* is what an expert does for one slice: all tokens of the slice that chose it, at
one rank. Tokens leave in the order of (slice, expert, token) and arrive so from each rank, whose
tokens follow one another in the sequence: so the rows of a piece of work are in the order of the
slice's tokens, whatever ranks have them. What comes back is added token by token in the order of
its choices, in float32 or wider, never by atomic additions. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.comm import Handle
from holdfast.parallel.expert_parallel.hosts import chosen_hosts
from holdfast.parallel.expert_parallel.products import Work, places_of, row_multiple
from holdfast.parallel.pipeline import ExpertTeam

SliceKey = tuple[int, int]
"""A micro-batch, and a slice of it."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where the tokens of a rank's slices go: the same for what goes there and what comes back."""

    team: ExpertTeam
    order: Tensor
    """int64[tokens times choices]: the choices by (rank, slice, expert, token)."""
    back: Tensor
    """int64[tokens times choices]: the place in `order` of each choice."""
    sent: tuple[int, ...]
    """The choices that go to each rank."""
    received: tuple[int, ...]
    """Those that come from each rank."""
    arranged: Tensor
    """int64[received]: the row among those of `work` of each received choice; see `places_of`."""
    work: tuple[Work, ...]
    """What this rank's experts do."""
    elsewhere: tuple[tuple[int, int], ...]
    """(expert of this rank, slices for which another rank's copy of it works)."""
    rows: int
    """The rows of `arranged` choices, with those between."""
    _under_way: list[tuple[Handle | None, Tensor, Tensor]] = field(
        default_factory=list, compare=False, repr=False
    )
    """The exchange that was begun, the memory of what arrives, and of what leaves until it has."""

    def to_experts(self, value: Tensor, per_token: int) -> Arriving:
        """Send the rows of tokens to their experts. Collective over the team.

        Args:
            value: float[tokens, hidden].
        """
        leaving = _Gathered.apply(value, self.order, self.back, per_token)
        return Arriving(self, _Leaving.apply(leaving, self))

    def to_tokens(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted sums of what a token's experts made: float[tokens, hidden]. Collective.

        Args:
            rows: float[rows, hidden].
            weights: float[tokens, choices], float32 or wider.
        """
        arrived: Any = _Returned.apply(rows, self)
        return _combined(_Placed.apply(arrived, self.order, self.back), weights)


@dataclass(frozen=True, slots=True)
class Arriving:
    """Rows on their way to this rank's experts."""

    way: Dispatch
    under_way: Any
    """float[received, hidden], not to be read yet."""

    def rows(self) -> Tensor:
        """Wait for the rows: float[rows, hidden]. What is computed before, here and in backward
        passes, is computed beside the exchange."""
        return _Arrived.apply(self.under_way, self.way)  # pyrefly: ignore[bad-return]


def dispatch(
    experts: Sequence[Tensor],
    slices: Sequence[SliceKey],
    count: int,
    team: ExpertTeam,
    layer: int,
    like: Tensor,
) -> Dispatch:
    """The way of tokens to the experts that they chose. Collective over the team.

    Args:
        experts: of each of this rank's slices, int64[tokens, choices], of its own tokens.
        slices: these slices; none where the rank hosts experts only.
        count: the number of all experts.
        like: has the dtype and the device of the hidden state.
    """
    most = team.most_slices
    here = torch.full((most, count + 2), -1, device=like.device)
    for place, (key, chosen) in enumerate(zip(slices, experts, strict=True)):
        here[place] = torch.cat([here.new_tensor(key), chosen.flatten().bincount(minlength=count)])
    keys, counts = _gathered_counts(here, team)
    hosts = chosen_hosts(counts, team.sources, team.hosts[layer])
    own = team.sources[team.index]
    flat = [chosen.flatten() + place * count for place, chosen in enumerate(experts)]
    wanted = torch.cat(flat) if flat else here.new_empty(0)
    to_rank = hosts[own].flatten()
    leaves = to_rank.to(like.device)[wanted] * (most * count) + wanted
    order = torch.sort(leaves, stable=True).indices
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=like.device)
    sent = torch.zeros(len(team.sources), dtype=torch.int64)
    mine = counts[team.index].clamp(min=0).flatten()
    sent.index_add_(0, to_rank, mine)
    arrangement = _arrange(counts, hosts == team.index, team, row_multiple(like.dtype))
    work, places = _work(arrangement, keys, team)
    return Dispatch(
        team=team,
        order=order,
        back=back,
        sent=tuple(sent.tolist()),
        received=arrangement.received,
        arranged=arrangement.rows.to(like.device),
        work=work,
        elsewhere=_elsewhere(keys, hosts, team, layer),
        rows=places,
    )


def _gathered_counts(here: Tensor, team: ExpertTeam) -> tuple[Tensor, Tensor]:
    """The slices of all members, int64[members, slices, 2], and the choices of each expert of
    their tokens, int64[members, slices, experts]; negative where there is no slice."""
    found = [here]
    if team.group is not None:
        found = [torch.empty_like(here) for _ in team.sources]
        team.group.all_gather(found, here).wait()
    table = torch.stack(found).cpu()
    return table[:, :, :2], table[:, :, 2:]


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """Where received choices lie."""

    received: tuple[int, ...]
    rows: Tensor
    pieces: Tensor
    """int64[pieces of work, 3]: expert, source, slice."""
    counts: list[int]
    places: list[int]


def _arrange(counts: Tensor, mine: Tensor, team: ExpertTeam, multiple: int) -> _Arrangement:
    """The rows of this rank's pieces of work, by expert, then by source and slice. Pure.

    Args:
        mine: bool[sources, slices, experts]: the pieces of work of this rank.
    """
    members: list[list[int]] = [[] for _ in range(len(mine))]
    for member, source in enumerate(team.sources):
        members[source].append(member)
    totals = torch.stack([counts[of_source].sum(0) for of_source in members])
    is_there = torch.stack([counts[of_source[0]] for of_source in members]) >= 0
    pieces = (mine & is_there).permute(2, 0, 1).nonzero()
    expert, source, slice_ = pieces.unbind(1)
    numbers = totals[source, slice_, expert].tolist()
    places = places_of(numbers, multiple)
    filled = torch.zeros_like(totals)
    filled[source, slice_, expert] = torch.tensor(places[:-1], dtype=torch.int64)
    received, rows = [], []
    for member, of_member in enumerate(team.sources):
        chosen = mine[of_member] & is_there[of_member]
        lengths, starts = counts[member][chosen], filled[of_member][chosen]
        filled[of_member] += counts[member].clamp(min=0)
        number = int(lengths.sum())
        before = torch.cumsum(lengths, 0) - lengths
        rows.append(torch.arange(number) + torch.repeat_interleave(starts - before, lengths))
        received.append(number)
    return _Arrangement(tuple(received), torch.cat(rows), pieces, numbers, places)


def _work(
    arrangement: _Arrangement, keys: Tensor, team: ExpertTeam
) -> tuple[tuple[Work, ...], int]:
    """The pieces of work of this rank, and the rows of all of them."""
    speaking = {source: member for member, source in reversed(list(enumerate(team.sources)))}
    named = keys.tolist()
    found = []
    for (expert, source, slice_), count in zip(
        arrangement.pieces.tolist(), arrangement.counts, strict=True
    ):
        micro_batch, number = named[speaking[source]][slice_]
        found.append(Work(expert, micro_batch, number, count))
    return tuple(found), arrangement.places[-1]


def _elsewhere(
    keys: Tensor, hosts: Tensor, team: ExpertTeam, layer: int
) -> tuple[tuple[int, int], ...]:
    """Of each expert that others have as well, the slices that they work for."""
    shared = [
        expert
        for expert, members in enumerate(team.hosts[layer])
        if len(members) > 1 and team.index in members
    ]
    if not shared:
        return ()
    first = [team.sources.index(source) for source in range(len(hosts))]
    is_there = keys[first, :, 0] >= 0
    return tuple(
        (expert, int((is_there & (hosts[:, :, expert] != team.index)).sum())) for expert in shared
    )


class _Gathered(torch.autograd.Function):
    """A row for each choice of each token; backward adds a token's in the order of its choices."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, order: Tensor, back: Tensor, per_token: int) -> Tensor:
        ctx.back, ctx.per_token = back, per_token
        return value[order // per_token]

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        by_choice = _by_token(gradient[ctx.back], ctx.per_token)
        return _sum_in_order(by_choice).to(gradient.dtype), None, None, None


class _Placed(torch.autograd.Function):
    """Rows in the order of tokens and their choices, from those in the order of experts."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.order = order
        return rows[back]

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.order], None, None


class _Leaving(torch.autograd.Function):
    """Rows of tokens on their way to experts; backward waits for the gradients' way back."""

    @staticmethod
    def forward(ctx: Any, leaving: Tensor, way: Dispatch) -> Tensor:
        ctx.way = way
        return _begin(leaving, way, way.sent, way.received)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _finish(ctx.way), None


class _Arrived(torch.autograd.Function):
    """Rows at their experts, once they are here; backward begins the gradients' way back."""

    @staticmethod
    def forward(ctx: Any, under_way: Tensor, way: Dispatch) -> Tensor:
        ctx.way = way
        return _laid_out(_finish(way), way)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        way, leaving = ctx.way, gradient[ctx.way.arranged]
        _begin(leaving, way, way.received, way.sent)
        return leaving, None  # what arrives is given by `_Leaving`


class _Returned(torch.autograd.Function):
    """Rows of tokens from those at their experts; backward goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Dispatch) -> Tensor:
        ctx.way = way
        _begin(rows[way.arranged], way, way.received, way.sent)
        return _finish(way)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        way = ctx.way
        _begin(gradient, way, way.sent, way.received)
        return _laid_out(_finish(way), way), None


def _laid_out(arrived: Tensor, way: Dispatch) -> Tensor:
    # Rows between experts are read by grouped kernels: they must be numbers.
    found = arrived.new_zeros(way.rows, arrived.shape[1])
    found[way.arranged] = arrived
    return found


def _begin(rows: Tensor, way: Dispatch, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
    """Begin to exchange rows: the memory in which others arrive."""
    group, handle, found, rows = way.team.group, None, rows, rows.contiguous()
    if group is not None:
        found = rows.new_empty(sum(received), rows.shape[1])
        handle = group.all_to_all(list(found.split(received)), list(rows.split(sent)))
    way._under_way.append((handle, found, rows))
    return found


def _finish(way: Dispatch) -> Tensor:
    """Wait for the rows of the exchange that was begun."""
    handle, found, _ = way._under_way.pop()
    if handle is not None:
        handle.wait()
    return found


def _combined(by_choice: Tensor, weights: Tensor) -> Tensor:
    """The weighted sums, in the type of the rows.

    Args:
        by_choice: float[tokens times choices, hidden].
    """
    per_token = weights.shape[1]
    rows = _by_token(by_choice, per_token)
    weighted = rows.to(weights.dtype) * weights.unsqueeze(-1)
    total = weighted[:, 0]
    for place in range(1, per_token):
        total = total + weighted[:, place]
    return total.to(by_choice.dtype)


def _sum_in_order(by_choice: Tensor) -> Tensor:
    """The sum over dim 1, one after another, in float32 or wider."""
    wide = torch.promote_types(by_choice.dtype, torch.float32)
    total = by_choice[:, 0].to(wide, copy=True)
    for place in range(1, by_choice.shape[1]):
        total += by_choice[:, place]
    return total


def _by_token(by_choice: Tensor, per_token: int) -> Tensor:
    """float[tokens times choices, hidden] -> float[tokens, choices, hidden]."""
    return by_choice.view(by_choice.shape[0] // per_token, per_token, by_choice.shape[1])
