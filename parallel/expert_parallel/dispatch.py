"""The way of tokens to their experts and back, over the ranks that have these.

A *piece of work* is what an expert does for one slice: all tokens of the slice that chose it, at
one rank; where a team joins slices, for all of them that are there. Tokens leave in the order of
(slice, expert, token) and arrive so from each rank, whose tokens follow one another in the
sequence: so the rows of a slice are in the order of its tokens, whatever ranks have them. What
comes back is added token by token in the order of its choices, in float32 or wider, never by atomic
additions. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.comm import Handle
from holdfast.parallel.expert_parallel.hosts import chosen_hosts
from holdfast.parallel.expert_parallel.products import Work, places_of, row_multiple
from holdfast.parallel.layout import GradientMark, SliceKey
from holdfast.parallel.pipeline import ExpertTeam, PassageInputs


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where the tokens of a rank's slices go: the same for what goes there and what comes back."""

    team: ExpertTeam
    tokens: Tensor
    """int64[leaving rows]: the token of each row that leaves: by (rank, slice, expert, token), or
    where the experts are all here, the row of `arranged`."""
    places: Tensor
    """int64[tokens, choices]: the row of each choice among those that leave, and come back."""
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
    inputs: PassageInputs | None
    """Takes what this rank's tokens bring to experts, if it is kept."""
    _under_way: list[tuple[Handle | None, Tensor, Tensor]] = field(
        default_factory=list, compare=False, repr=False
    )
    """The exchange that was begun, the memory of what arrives, and of what leaves until it has."""

    def to_experts(self, value: Tensor) -> Arriving:
        """Send the rows of tokens to their experts. Collective over the team.

        Args:
            value: float[tokens, hidden].
        """
        leaving = _Gathered.apply(value, self.tokens, self.places, self.inputs)
        return Arriving(self, leaving if self.is_local else _Leaving.apply(leaving, self))

    def to_tokens(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted sums of what a token's experts made: float[tokens, hidden]. Collective.

        Args:
            rows: float[rows, hidden].
            weights: float[tokens, choices], float32 or wider.
        """
        arrived = rows if self.is_local else _Returned.apply(rows, self)
        return _Combined.apply(arrived, self.places, weights, self.inputs)  # pyrefly: ignore[bad-return]

    @property
    def is_local(self) -> bool:
        """Whether all experts are here."""
        return self.team.group is None


@dataclass(frozen=True, slots=True)
class Arriving:
    """Rows on their way to this rank's experts."""

    way: Dispatch
    under_way: Any
    """float[received, hidden], not to be read yet."""

    def rows(self) -> Tensor:
        """Wait for the rows: float[rows, hidden]. What is computed before, here and in backward
        passes, is computed beside the exchange."""
        if self.way.is_local:
            return self.under_way
        return _Arrived.apply(self.under_way, self.way)  # pyrefly: ignore[bad-return]


def dispatch(
    experts: Sequence[Tensor],
    slices: Sequence[SliceKey],
    per_token: int,
    count: int,
    team: ExpertTeam,
    layer: int,
    like: Tensor,
) -> Dispatch:
    """The way of tokens to the experts that they chose. Collective over the team.

    Args:
        experts: of each of this rank's slices, int64[tokens, choices], of its own tokens.
        slices: these slices; none where the rank hosts experts only.
        per_token: the choices of a token.
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
    sent = torch.zeros(len(team.sources), dtype=torch.int64)
    mine = counts[team.index].clamp(min=0).flatten()
    sent.index_add_(0, to_rank, mine)
    arrangement = _arrange(counts, keys, hosts == team.index, team, row_multiple(like.dtype))
    tokens, places = _leaving(order, per_token, arrangement, team)
    inputs = None
    if team.inputs is not None and team.group is not None and slices:
        inputs = PassageInputs(team.inputs, layer, slices, experts, team.share)
    return Dispatch(
        team=team,
        tokens=tokens,
        places=places,
        sent=tuple(sent.tolist()),
        received=arrangement.received,
        arranged=arrangement.arranged.to(like.device),
        work=arrangement.work,
        elsewhere=_elsewhere(keys, hosts, team, layer),
        rows=arrangement.rows,
        inputs=inputs,
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
    arranged: Tensor
    work: tuple[Work, ...]
    rows: int


def _arrange(
    counts: Tensor, keys: Tensor, mine: Tensor, team: ExpertTeam, multiple: int
) -> _Arrangement:
    """The rows of this rank's work, by expert, then by source and slice. Pure.

    Args:
        mine: bool[sources, slices, experts]: the slices that this rank's experts work for.
    """
    members: list[list[int]] = [[] for _ in range(len(mine))]
    for member, source in enumerate(team.sources):
        members[source].append(member)
    totals = torch.stack([counts[of_source].sum(0) for of_source in members])
    is_there = torch.stack([counts[of_source[0]] for of_source in members]) >= 0
    pieces = (mine & is_there).permute(2, 0, 1).nonzero()
    expert, source, slice_ = pieces.unbind(1)
    work = _work(pieces.tolist(), totals[source, slice_, expert].tolist(), keys, team)
    places = places_of([piece.tokens for piece in work], multiple)
    starts = [
        start
        for place, piece in zip(places, work, strict=False)
        for start in places_of([mark.tokens for mark in piece.marks], 1, place)[:-1]
    ]
    filled = torch.zeros_like(totals)
    filled[source, slice_, expert] = torch.tensor(starts, dtype=torch.int64)
    received, rows = [], []
    for member, of_member in enumerate(team.sources):
        chosen = mine[of_member] & is_there[of_member]
        lengths, starts = counts[member][chosen], filled[of_member][chosen]
        filled[of_member] += counts[member].clamp(min=0)
        number = int(lengths.sum())
        before = torch.cumsum(lengths, 0) - lengths
        rows.append(torch.arange(number) + torch.repeat_interleave(starts - before, lengths))
        received.append(number)
    return _Arrangement(tuple(received), torch.cat(rows), work, places[-1])


def _leaving(
    order: Tensor, per_token: int, arrangement: _Arrangement, team: ExpertTeam
) -> tuple[Tensor, Tensor]:
    """The token of each row that leaves, and the row of each token's choices; see `Dispatch`.

    Args:
        order: int64[tokens times choices]: the choices in the order of leaving rows.
    """
    rows = torch.arange(len(order), device=order.device)
    tokens = order // per_token
    if team.group is None:  # rows between get some token
        rows = arrangement.arranged.to(order.device)
        tokens = order.new_zeros(arrangement.rows).index_copy_(0, rows, tokens)
    places = torch.empty_like(order).index_copy_(0, order, rows)
    return tokens, places.view(-1, per_token)


def _work(
    pieces: Sequence[Sequence[int]], counts: Sequence[int], keys: Tensor, team: ExpertTeam
) -> tuple[Work, ...]:
    """The pieces of work of this rank.

    Args:
        pieces: (expert, source, slice) of each slice that an expert works for, ascending.
        counts: the tokens of each.
    """
    speaking = {source: member for member, source in reversed(list(enumerate(team.sources)))}
    named = keys.tolist()
    found: list[Work] = []
    for (expert, source, slice_), count in zip(pieces, counts, strict=True):
        micro_batch, number = named[speaking[source]][slice_]
        marks = (GradientMark(count, number, micro_batch),)
        if team.joins and found and found[-1].expert == expert:
            marks = found.pop().marks + marks
        found.append(Work(expert, marks))
    return tuple(found)


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
    def forward(
        ctx: Any, value: Tensor, tokens: Tensor, places: Tensor, inputs: PassageInputs | None
    ) -> Tensor:
        ctx.places, ctx.inputs = places, inputs
        if inputs is not None:
            ctx.save_for_backward(value)
        return value.index_select(0, tokens)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.inputs is not None:
            ctx.inputs.note_tokens(*ctx.saved_tensors)
        first, *others = ctx.places.unbind(1)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.index_select(0, first).to(wide)
        for rows in others:
            total += gradient.index_select(0, rows)
        return total.to(gradient.dtype), None, None, None


class _Combined(torch.autograd.Function):
    """The weighted sums of each token's rows, in the order of its choices, in the rows' type."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, places: Tensor, weights: Tensor, inputs: PassageInputs | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.places, ctx.inputs = places, inputs
        total: Tensor | None = None
        for own, weight in _by_choice(places, weights):
            weighted = rows.index_select(0, own).to(weights.dtype).mul_(weight)
            total = weighted if total is None else total.add_(weighted)
        assert total is not None
        return total.to(rows.dtype)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None]:
        rows, weights = ctx.saved_tensors
        if ctx.inputs is not None:
            ctx.inputs.note_gradient(gradient, weights)
        by_rows = torch.empty_like(rows)  # rows between are not read
        by_weights = torch.empty_like(weights)
        wide = gradient.to(weights.dtype)
        for choice, (own, weight) in enumerate(_by_choice(ctx.places, weights)):
            by_rows.index_copy_(0, own, (wide * weight).to(rows.dtype))
            products = rows.index_select(0, own).to(weights.dtype).mul_(wide)
            by_weights[:, choice] = products.sum(1)
        return by_rows, None, by_weights, None


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
        way, leaving = ctx.way, gradient.index_select(0, ctx.way.arranged)
        _begin(leaving, way, way.received, way.sent)
        return leaving, None  # what arrives is given by `_Leaving`


class _Returned(torch.autograd.Function):
    """Rows of tokens from those at their experts; backward goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Dispatch) -> Tensor:
        ctx.way = way
        _begin(rows.index_select(0, way.arranged), way, way.received, way.sent)
        return _finish(way)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        way = ctx.way
        _begin(gradient, way, way.sent, way.received)
        return _laid_out(_finish(way), way), None


def _laid_out(arrived: Tensor, way: Dispatch) -> Tensor:
    found = arrived.new_empty(way.rows, arrived.shape[1])
    return found.index_copy_(0, way.arranged, arrived)


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


def _by_choice(places: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each choice, its tokens' rows and their weights: int64[tokens], float[tokens, 1]."""
    return zip(places.unbind(1), weights.split(1, 1), strict=True)
