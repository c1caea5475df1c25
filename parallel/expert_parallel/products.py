"""The products of experts with the tokens that came to them: SwiGLU, expert by expert. Local.

Each expert's tokens are one matrix, so its bits depend on these alone, whatever other experts a
rank has. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.pipeline import WeightGradientQueue

_ALIGNED_BYTES = 64


class Work(NamedTuple):
    """What an expert does for a slice."""

    expert: int
    micro_batch: int
    slice: int
    tokens: int


def row_multiple(dtype: torch.dtype) -> int:
    """The rows of which each expert's place among tokens is a multiple: so matrices are aligned."""
    return _ALIGNED_BYTES // dtype.itemsize


def places_of(counts: Sequence[int], multiple: int) -> list[int]:
    """The first row of each piece of work, and the number of all rows. Pure.

    Args:
        counts: the tokens of each piece.
        multiple: of `row_multiple`.
    """
    places = [0]
    for count in counts:
        places.append(places[-1] + -(-count // multiple) * multiple)
    return places


def expert_products(
    rows: Tensor,
    work: Sequence[Work],
    experts: Mapping[int, tuple[nn.Parameter, nn.Parameter]],
    queue: WeightGradientQueue,
    elsewhere: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """What each expert makes of its tokens.

    Args:
        rows: float[places, hidden]: the tokens of each piece of work from its place on
            (`places_of`). Rows between are neither read nor written.
        work: the pieces, those of an expert one after another.
        experts: by expert of this rank: float[2 intermediate, hidden], float[hidden, intermediate].
        queue: the queue of the weights' gradients: each piece of work gives one, also without
            tokens.
        elsewhere: (expert, the pieces of its work that other ranks do).
    Returns:
        float[places, hidden]
    """
    parameters = [parameter for own in experts.values() for parameter in own]
    pieces = _Pieces(tuple(work), tuple(elsewhere), {e: k for k, e in enumerate(experts)}, queue)
    return _ExpertProducts.apply(rows, pieces, *parameters)  # pyrefly: ignore[bad-return]


class _Pieces(NamedTuple):
    """The work of a rank's experts."""

    work: tuple[Work, ...]
    elsewhere: tuple[tuple[int, int], ...]
    index_of: Mapping[int, int]
    """The place of an expert's two matrices among all."""
    queue: WeightGradientQueue

    def places(self, multiple: int) -> list[int]:
        return places_of([piece.tokens for piece in self.work], multiple)


class _ExpertProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pieces: _Pieces, *own: Tensor) -> Tensor:
        hidden, wide = rows.shape[1], own[0].shape[0] if own else 0
        found, between = rows.new_empty(rows.shape[0], hidden), rows.new_empty(len(rows), wide)
        places = pieces.places(row_multiple(rows.dtype))
        for place, piece in zip(places, pieces.work, strict=False):
            if piece.tokens:
                first = 2 * pieces.index_of[piece.expert]
                here = slice(place, place + piece.tokens)
                torch.mm(rows[here], own[first].t(), out=between[here])
                torch.mm(_gated(between[here]), own[first + 1].t(), out=found[here])
        ctx.save_for_backward(rows, between, *own)
        ctx.pieces, ctx.places, ctx.parameters = pieces, places, own
        return found

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, wide, *own = ctx.saved_tensors
        pieces, needed = ctx.pieces, ctx.needs_input_grad[2:]
        by_rows, by_wide = torch.empty_like(rows), torch.empty_like(wide)
        gated_rows = wide.new_empty(wide.shape[0], wide.shape[1] // 2)
        found: list[Tensor | None] = [None] * len(own)
        gradient = gradient.contiguous()
        for place, piece in zip(ctx.places, pieces.work, strict=False):
            here, first = slice(place, place + piece.tokens), 2 * pieces.index_of[piece.expert]
            gated = torch.mm(gradient[here], own[first + 1])
            gated_rows[here] = _gated(wide[here])
            _gate_backward(gated, wide[here], by_wide[here])
            torch.mm(by_wide[here], own[first], out=by_rows[here])
            queue = pieces.queue.of(piece.slice, piece.micro_batch)
            for index, output, value in (
                (first, by_wide[here], rows[here]),
                (first + 1, gradient[here], gated_rows[here]),
            ):
                if not needed[index]:
                    continue
                if queue.has_sink:
                    queue.put(ctx.parameters[index], (output,), value)
                else:
                    product, before = output.t() @ value, found[index]
                    found[index] = product if before is None else before + product
        for expert, count in pieces.elsewhere if pieces.queue.has_sink else ():
            first = 2 * pieces.index_of[expert]
            for parameter in ctx.parameters[first : first + 2]:
                pieces.queue.pass_over(parameter, count)
        return by_rows, None, *found


def _gated(wide: Tensor) -> Tensor:
    """SwiGLU: float[rows, 2 intermediate] -> float[rows, intermediate], aligned."""
    gate, up = wide.chunk(2, -1)
    return F.silu(gate) * up


def _gate_backward(gradient: Tensor, wide: Tensor, found: Tensor) -> None:
    """Write the gradient by `wide` to `found`."""
    gate, up = wide.chunk(2, -1)
    by_gate, by_up = found.chunk(2, -1)
    by_up.copy_(gradient * F.silu(gate))
    by_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
