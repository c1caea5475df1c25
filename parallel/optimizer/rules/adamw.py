"""AdamW (Loshchilov and Hutter 2019) by torch's fused kernel. Importing it needs no torch.

The kernel is elementwise: grouping of blocks does not affect the result. Exact-mode safe. Local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.parallel.optimizer.rules.rule import BlockUpdate, OptimizerRule, StateKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """The constants of AdamW."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


def _settings(section: Any) -> AdamWSettings:
    """The constants from the `[optimizer]` section, which has fields of these names."""
    betas = (section.betas[0], section.betas[1])
    return AdamWSettings(betas, section.eps, section.weight_decay)


def _update_blocks(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: AdamWSettings
) -> None:
    for decays in (True, False):
        _update([u for u in updates if u.decays == decays], step, lr, settings)


def _update(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: AdamWSettings
) -> None:
    import torch

    if not updates:
        return
    torch._fused_adamw_(
        [u.master for u in updates],
        [u.gradient for u in updates],
        [u.state[0] for u in updates],
        [u.state[1] for u in updates],
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


def _reference(
    groups: Sequence[tuple[list[nn.Parameter], bool]], settings: AdamWSettings
) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0}
            for parameters, decays in groups
        ],
        lr=0.0,
        betas=settings.betas,
        eps=settings.eps,
    )


ADAMW = OptimizerRule(
    name="adamw",
    kinds=(StateKind("exp_avg"), StateKind("exp_avg_sq")),
    settings=_settings,
    update_blocks=_update_blocks,
    reference=_reference,
)
"""AdamW (Loshchilov and Hutter 2019), with two moments."""
