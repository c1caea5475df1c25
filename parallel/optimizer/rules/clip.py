"""QK-clip (Kimi Team 2025, "Kimi K2", section 2.1), after the update of any optimizer.

Queries and keys of a head whose largest logit of the step exceeds a limit are scaled down, so that
this logit would be the limit. Every element is multiplied once: neither the grouping of blocks nor
their cut affects the result. Importing it needs no torch. Exact-mode safe. Local.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from holdfast.parallel.layout import Box, HeadRows
from holdfast.parallel.optimizer.rules.rule import BlockUpdate, MatrixRule, OptimizerRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HeadFactors = Mapping[int, Sequence[float]]
"""Of layers of the plan, the factor of each head; those that are not there have none below 1."""
_Update = Callable[[Sequence[BlockUpdate], "Tensor", float, Any], None]


def head_factors(logits: Sequence[Sequence[float]], limit: float) -> HeadFactors:
    """What the logits of each head are to be multiplied by, to exceed a limit no more. Pure.

    Args:
        logits: of each layer, the largest of each head; empty where it has no attention.
        limit: 0: there is none.
    """
    if not limit:
        return {}
    return {
        layer: [min(1.0, limit / largest) if largest > 0 else 1.0 for largest in of_heads]
        for layer, of_heads in enumerate(logits)
        if any(largest > limit for largest in of_heads)
    }


def row_factors(heads: HeadRows, box: Box, factors: Sequence[float]) -> list[float]:
    """The factor of each row, in the dimension of the heads, of a box of a logical tensor. Pure.

    Args:
        factors: of each head.
    """
    of_head = [power for count, power in heads.powers for _ in range(count)]
    found = []
    for row in range(box.start[heads.dim] - heads.first, box.stop[heads.dim] - heads.first):
        head, place = divmod(row, len(of_head))
        found.append(factors[head] ** of_head[place])
    return found


def scale_of(
    heads: HeadRows, box: Box, factors: Sequence[float], like: torch.Tensor
) -> torch.Tensor:
    """The factors of a block's elements: of the dtype of `like`, to be multiplied with its box.

    Args:
        box: the block's, in its logical tensor.
        factors: of each head.
    """
    import torch

    rows = torch.tensor(row_factors(heads, box, factors), dtype=torch.float64)
    after = len(box.shape) - heads.dim - 1
    return rows.to(like).view(-1, *(1,) * after)


def with_clip(rule: OptimizerRule[Any]) -> OptimizerRule[Any]:
    """The same optimizer, which then scales blocks that have a `scale`. Pure."""
    matrices = rule.matrices
    return replace(
        rule,
        update_blocks=_clipping(rule.update_blocks),
        matrices=matrices and MatrixRule(_clipping(matrices.update), matrices.reference),
    )


def _clipping(update: _Update) -> _Update:
    def both(updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: Any) -> None:
        update(updates, step, lr, settings)
        for block in updates:
            if block.scale is not None:
                assert block.heads is not None
                block.master.view(block.heads[1].shape).mul_(block.scale)

    return both
