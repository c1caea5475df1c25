"""The products of experts with the tokens that came to them: SwiGLU, expert by expert. Local.

The tokens of a piece of work are one matrix, so its bits depend on these alone, whatever other
pieces a rank has. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.parallel.expert_parallel.gated import swiglu, swiglu_backward
from holdfast.parallel.layout import GradientMark
from holdfast.parallel.pipeline import WeightGradientQueue

_ALIGNED_BYTES = 64


class Work(NamedTuple):
    """What an expert computes as one: the tokens of a slice, or of several."""

    expert: int
    marks: tuple[GradientMark, ...]
    """Those of the slices, which have the tokens one after another."""

    @property
    def tokens(self) -> int:
        """The tokens of all slices."""
        return sum(mark.tokens for mark in self.marks)


def row_multiple(dtype: torch.dtype) -> int:
    """The rows of which each expert's place among tokens is a multiple: so matrices are aligned."""
    return _ALIGNED_BYTES // dtype.itemsize


def places_of(counts: Sequence[int], multiple: int, first: int = 0) -> list[int]:
    """The first row of each piece of work, and the one after the last. Pure.

    Args:
        counts: the tokens of each piece.
        multiple: of `row_multiple`.
    """
    places = [first]
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
        queue: the queue of the weights' gradients: each slice gives one, also without tokens.
        elsewhere: (expert, the slices for which other ranks' copies of it work).
    Returns:
        float[places, hidden]
    """
    parameters = [parameter for own in experts.values() for parameter in own]
    index_of = {expert: index for index, expert in enumerate(experts)}
    counts = [piece.tokens for piece in work]
    places = places_of(counts, row_multiple(rows.dtype))
    sizes = [
        size
        for place, after, count in zip(places, places[1:], counts, strict=False)
        for size in (count, after - place - count)
    ]
    pieces = _Pieces(tuple(work), tuple(elsewhere), index_of, queue, sizes)
    return _ExpertProducts.apply(rows, pieces, *parameters)  # pyrefly: ignore[bad-return]


class _Pieces(NamedTuple):
    """The work of a rank's experts."""

    work: tuple[Work, ...]
    elsewhere: tuple[tuple[int, int], ...]
    index_of: Mapping[int, int]
    """The place of an expert's two matrices among all."""
    queue: WeightGradientQueue
    sizes: list[int]
    """The rows of each piece of work, and between it and the next."""

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of each piece of work: views."""
        return rows.split(self.sizes)[::2]


class _ExpertProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pieces: _Pieces, *own: Tensor) -> Tensor:
        hidden, width = rows.shape[1], own[0].shape[0] if own else 0
        found, wide = rows.new_empty(rows.shape[0], hidden), rows.new_empty(len(rows), width)
        for piece, value, outputs, of_wide in zip(
            pieces.work, *map(pieces.split, (rows, found, wide)), strict=True
        ):
            if len(value):
                first = 2 * pieces.index_of[piece.expert]
                torch.mm(value, own[first].t(), out=of_wide)
                torch.mm(swiglu(of_wide), own[first + 1].t(), out=outputs)
        ctx.save_for_backward(rows, wide, *own)
        ctx.pieces, ctx.parameters = pieces, own
        return found

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, wide, *own = ctx.saved_tensors
        pieces, needed = ctx.pieces, ctx.needs_input_grad[2:]
        by_rows, by_wide = torch.empty_like(rows), torch.empty_like(wide)
        gated_rows = wide.new_empty(wide.shape[0], wide.shape[1] // 2)
        found: list[Tensor | None] = [None] * len(own)
        of_pieces = (by_rows, gradient.contiguous(), rows, wide, by_wide, gated_rows)
        for piece, of_rows, outputs, value, of_wide, by, gated in zip(
            pieces.work, *map(pieces.split, of_pieces), strict=True
        ):
            first = 2 * pieces.index_of[piece.expert]
            swiglu_backward(torch.mm(outputs, own[first + 1]), of_wide, gated, by)
            torch.mm(by, own[first], out=of_rows)
            for index, output, input_ in ((first, by, value), (first + 1, outputs, gated)):
                if not needed[index]:
                    continue
                if pieces.queue.has_sink:
                    pieces.queue.put(ctx.parameters[index], (output,), input_, piece.marks)
                else:
                    product, before = output.t() @ input_, found[index]
                    found[index] = product if before is None else before.add_(product)
        for expert, count in pieces.elsewhere if pieces.queue.has_sink else ():
            first = 2 * pieces.index_of[expert]
            for parameter in ctx.parameters[first : first + 2]:
                pieces.queue.pass_over(parameter, count)
        return by_rows, None, *found


def put_weight_gradients(
    value: Tensor,
    gradient: Tensor,
    piece: Work,
    matrices: tuple[nn.Parameter, nn.Parameter],
    queue: WeightGradientQueue,
) -> None:
    """Compute the weight gradients of a piece of work again, bit for bit, without those of rows.

    Args:
        value: float[tokens, hidden], contiguous, at a multiple of 64 bytes.
        gradient: of what the expert made of them; as `value`.
        queue: has a sink.
    """
    gate_up, down = matrices
    with torch.no_grad():
        wide = torch.mm(value, gate_up.t())
        gated, by_wide = value.new_empty(len(value), down.shape[1]), torch.empty_like(wide)
        swiglu_backward(torch.mm(gradient, down), wide, gated, by_wide)
    queue.put(gate_up, (by_wide,), value, piece.marks)
    queue.put(down, (gradient,), gated, piece.marks)
