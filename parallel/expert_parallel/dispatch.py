"""The way of tokens to their experts and back, over the ranks that have these.

Tokens leave in the order of (expert, token) and arrive so from each rank, whose tokens follow one
another in the sequence: so an expert's rows are in the order of the whole slice's tokens, whatever
ranks have them. What comes back is added token by token in the order of its choices, in float32 or
wider, never by atomic additions. Exact-mode safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator
from holdfast.parallel.expert_parallel.products import places_of, row_multiple


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where the tokens of a slice go: the same for what goes there and what comes back."""

    group: Communicator | None
    """The ranks that have the experts, equally many each, in order; None: this one has all."""
    order: Tensor
    """int64[tokens times choices]: the choices by (expert, token)."""
    back: Tensor
    """int64[tokens times choices]: the place in `order` of each choice."""
    sent: tuple[int, ...]
    """The choices that go to each rank."""
    received: tuple[int, ...]
    """Those that come from each rank."""
    arranged: Tensor
    """int64[received]: the row among an expert's own of each received choice; see `places_of`."""
    counts: tuple[int, ...]
    """The choices of each expert of this rank, from all ranks."""
    rows: int
    """The rows of `arranged` experts, with those between."""

    def to_experts(self, value: Tensor, per_token: int) -> Tensor:
        """The rows of this rank's experts: float[rows, hidden]. Collective over the group.

        Args:
            value: float[tokens, hidden].
        """
        leaving = _Gathered.apply(value, self.order, self.back, per_token)
        return _Exchanged.apply(leaving, self, True)  # pyrefly: ignore[bad-return]

    def to_tokens(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted sums of what a token's experts made: float[tokens, hidden]. Collective.

        Args:
            rows: float[rows, hidden].
            weights: float[tokens, choices], float32 or wider.
        """
        arrived: Any = _Exchanged.apply(rows, self, False)
        return _combined(_Placed.apply(arrived, self.order, self.back), weights)


def dispatch(
    experts: Tensor, count: int, group: Communicator | None, dtype: torch.dtype
) -> Dispatch:
    """The way of tokens to the experts that they chose. Collective over the group.

    Args:
        experts: int64[tokens, choices], of this rank's tokens.
        count: the number of all experts, a multiple of the group's size.
        dtype: of the hidden state.
    """
    flat = experts.flatten()
    order = torch.sort(flat, stable=True).indices
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    own = torch.bincount(flat, minlength=count)
    if group is None:
        by_rank = own[None]
        index, size = 0, 1
    else:
        gathered = [torch.empty_like(own) for _ in range(group.size)]
        group.all_gather(gathered, own).wait()
        by_rank = torch.stack(gathered)
        index, size = group.index, group.size
    here = count // size
    table = by_rank.tolist()
    mine = [counts[index * here : (index + 1) * here] for counts in table]
    totals = [sum(of_expert) for of_expert in zip(*mine, strict=True)]
    places = places_of(totals, row_multiple(dtype))
    arranged: list[Tensor] = []
    filled = list(places[:-1])
    for counts in mine:
        for expert, number in enumerate(counts):
            arranged.append(torch.arange(filled[expert], filled[expert] + number))
            filled[expert] += number
    return Dispatch(
        group=group,
        order=order,
        back=back,
        sent=tuple(sum(table[index][r * here : (r + 1) * here]) for r in range(size)),
        received=tuple(map(sum, mine)),
        arranged=torch.cat(arranged).to(order.device),
        counts=tuple(totals),
        rows=places[-1],
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
        by_choice = gradient[ctx.back].unflatten(0, (-1, ctx.per_token))
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


class _Exchanged(torch.autograd.Function):
    """Rows at their experts, from those of tokens, or the reverse; backward goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Dispatch, arrives: bool) -> Tensor:
        ctx.way, ctx.arrives = way, arrives
        return _arrive(rows, way) if arrives else _return(rows, way)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        moved = _return if ctx.arrives else _arrive
        return moved(gradient, ctx.way), None, None


def _arrive(leaving: Tensor, way: Dispatch) -> Tensor:
    arrived = _exchange(leaving, way.group, way.sent, way.received)
    # Rows between experts are read by grouped kernels: they must be numbers.
    found = leaving.new_zeros(way.rows, leaving.shape[1])
    found[way.arranged] = arrived
    return found


def _return(rows: Tensor, way: Dispatch) -> Tensor:
    return _exchange(rows[way.arranged], way.group, way.received, way.sent)


def _exchange(
    rows: Tensor, group: Communicator | None, sent: tuple[int, ...], received: tuple[int, ...]
) -> Tensor:
    if group is None:
        return rows
    found = rows.new_empty(sum(received), rows.shape[1])
    group.all_to_all(list(found.split(received)), list(rows.contiguous().split(sent))).wait()
    return found


def _combined(by_choice: Tensor, weights: Tensor) -> Tensor:
    """The weighted sums, in the type of the rows.

    Args:
        by_choice: float[tokens times choices, hidden].
    """
    per_token = weights.shape[1]
    rows = by_choice.unflatten(0, (-1, per_token))
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
