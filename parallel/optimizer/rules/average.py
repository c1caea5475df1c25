"""The exponential moving average of the weights, as one more kind of any optimizer's state.

It begins with the weights after the first update, as torch.optim.swa_utils.AveragedModel does.
Importing it needs no torch. Exact-mode safe. Local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from holdfast.parallel.optimizer.rules.rule import (
    AVERAGE,
    BlockUpdate,
    MatrixRule,
    OptimizerRule,
    StateKind,
)

if TYPE_CHECKING:
    from torch import Tensor

_Update = Callable[[Sequence[BlockUpdate], "Tensor", float, Any], None]


def with_average(rule: OptimizerRule[Any], decay: float) -> OptimizerRule[Any]:
    """The same optimizer, which keeps the average of master values after its own kinds. Pure.

    Args:
        decay: the share of the average that stays in an update.
    """
    matrices = rule.matrices
    return replace(
        rule,
        kinds=(*rule.kinds, StateKind(AVERAGE)),
        update_blocks=_averaging(rule.update_blocks, decay),
        balance=_averaging(rule.balance, decay),
        matrices=matrices and MatrixRule(_averaging(matrices.update, decay), matrices.reference),
    )


def _averaging(update: _Update, decay: float) -> _Update:
    """The update, followed by that of the average, which rounds each operation once."""

    def both(updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: Any) -> None:
        import torch

        update([replace(u, state=u.state[:-1]) for u in updates], step, lr, settings)
        for block in updates:
            average = block.state[-1]
            kept = torch.full_like(average[:1], decay).mul_(step > 1)  # without a wait for a GPU
            average.mul_(kept).add_(block.master * (1.0 - kept))

    return both
