"""AdamW on blocks: the one update that owners and shadows apply, so that both get the same bits.

torch's fused kernel (Loshchilov and Hutter 2019). It is elementwise: how blocks are grouped is all one.
Exact-mode safe. Local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Fence(Protocol):
    """What protects state that somebody still copies."""

    def __call__(self, number: int) -> int:
        """Return once block `number` may change (the count of all: whatever else this rank holds).

        Returns:
            The highest number that may change as well.
        """
        ...


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """The constants of AdamW."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """What the kernel takes of one block: flat tensors of equal length and dtype."""

    master: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool


def update_blocks(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: AdamWSettings
) -> None:
    """One step of AdamW on every block, in place.

    Args:
        step: float32 scalar, the number of this update, counted from 1.
    """
    for decays in (True, False):
        _update([u for u in updates if u.decays == decays], step, lr, settings)


def _update(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: AdamWSettings
) -> None:
    if not updates:
        return
    torch._fused_adamw_(
        [u.master for u in updates],
        [u.gradient for u in updates],
        [u.exp_avg for u in updates],
        [u.exp_avg_sq for u in updates],
        [],
        [step] * len(updates),
        amsgrad=False,
        lr=lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        weight_decay=settings.weight_decay if updates[0].decays else 0.0,
        eps=settings.eps,
        maximize=False,
    )
