"""The products of experts with the tokens that came to them: SwiGLU, expert by expert. Local.

Each expert's tokens are one matrix, so its bits depend on these alone, whatever other experts a
rank has. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.pipeline import WeightGradientQueue

_ALIGNED_BYTES = 64


def row_multiple(dtype: torch.dtype) -> int:
    """The rows of which each expert's place among tokens is a multiple: so matrices are aligned."""
    return _ALIGNED_BYTES // dtype.itemsize


def places_of(counts: Sequence[int], multiple: int) -> list[int]:
    """The first row of each expert's tokens, and the number of all rows. Pure.

    Args:
        counts: the tokens of each expert.
        multiple: of `row_multiple`.
    """
    places = [0]
    for count in counts:
        places.append(places[-1] + -(-count // multiple) * multiple)
    return places


def expert_products(
    rows: Tensor,
    counts: Sequence[int],
    gate_up: Sequence[nn.Parameter],
    down: Sequence[nn.Parameter],
    queue: WeightGradientQueue,
) -> Tensor:
    """What each expert makes of its tokens.

    Args:
        rows: float[places, hidden]: the tokens of each expert from its place on (`places_of`).
            Rows between are neither read nor written.
        counts: the tokens of each expert.
        gate_up: of each expert, float[2 intermediate, hidden].
        down: of each expert, float[hidden, intermediate].
        queue: the queue of the weights' gradients: each expert gets one, also without tokens.
    Returns:
        float[places, hidden]
    """
    return _ExpertProducts.apply(  # pyrefly: ignore[bad-return]
        rows, tuple(counts), queue, *gate_up, *down
    )


class _ExpertProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: tuple[int, ...], queue: WeightGradientQueue, *own: Tensor
    ) -> Tensor:
        gate_up, down = own[: len(counts)], own[len(counts) :]
        found = rows.new_empty(rows.shape[0], down[0].shape[0])
        wide = rows.new_empty(rows.shape[0], gate_up[0].shape[0])
        places = places_of(counts, row_multiple(rows.dtype))
        for place, count, first, second in zip(places, counts, gate_up, down, strict=False):
            if count:
                here = slice(place, place + count)
                torch.mm(rows[here], first.t(), out=wide[here])
                torch.mm(_gated(wide[here]), second.t(), out=found[here])
        ctx.save_for_backward(rows, wide, *own)
        ctx.counts, ctx.places, ctx.queue, ctx.parameters = counts, places, queue, own
        return found

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, wide, *own = ctx.saved_tensors
        counts, queue = ctx.counts, ctx.queue
        gate_up, down = own[: len(counts)], own[len(counts) :]
        by_rows = torch.empty_like(rows)
        by_wide = torch.empty_like(wide)
        gated_rows = wide.new_empty(wide.shape[0], wide.shape[1] // 2)
        found: list[Tensor | None] = [None] * len(own)
        gradient = gradient.contiguous()
        for expert, (place, count) in enumerate(zip(ctx.places, counts, strict=False)):
            here = slice(place, place + count)
            gated = torch.mm(gradient[here], down[expert])
            gated_rows[here] = _gated(wide[here])
            _gate_backward(gated, wide[here], by_wide[here])
            torch.mm(by_wide[here], gate_up[expert], out=by_rows[here])
            for index, output, value in (
                (expert, by_wide[here], rows[here]),
                (len(counts) + expert, gradient[here], gated_rows[here]),
            ):
                if not ctx.needs_input_grad[3 + index]:
                    continue
                if queue.has_sink:
                    queue.put(ctx.parameters[index], (output,), value)
                else:
                    found[index] = output.t() @ value
        return by_rows, None, None, *found


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
