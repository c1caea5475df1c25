"""Stochastic gradient descent with momentum, as torch.optim.SGD. Importing it needs no torch.

Every operation rounds once and is elementwise: neither the grouping of blocks nor their cut affects
the result. Exact-mode safe. Local.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.parallel.optimizer.rules.rule import BlockUpdate, OptimizerRule, OwnKey, StateKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class SGDSettings:
    """The constants of SGD."""

    momentum: float
    nesterov: bool
    weight_decay: float


def _settings(section: Any) -> SGDSettings:
    """The constants from the `[optimizer]` section, which has fields of these names."""
    return SGDSettings(section.momentum, section.nesterov, section.weight_decay)


def _problems(section: Any) -> Iterator[str]:
    if not 0 <= section.momentum < 1:
        yield f"optimizer.momentum = {section.momentum}: must be at least 0 and less than 1"
    if section.nesterov and not section.momentum:
        yield "optimizer.nesterov = true needs optimizer.momentum above 0"


def _update_blocks(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: SGDSettings
) -> None:
    for update in updates:
        [momentum], gradient = update.state, update.gradient
        if update.decays and settings.weight_decay:
            gradient = (update.master * settings.weight_decay).add_(gradient)
        momentum.mul_(settings.momentum).add_(gradient)
        direction = momentum
        if settings.nesterov:
            direction = (momentum * settings.momentum).add_(gradient)
        update.master.sub_(direction * lr)


def _reference(
    groups: Sequence[tuple[list[nn.Parameter], bool]], settings: SGDSettings
) -> torch.optim.Optimizer:
    import torch

    return torch.optim.SGD(
        [
            {"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0}
            for parameters, decays in groups
        ],
        lr=0.0,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
    )


SGD = OptimizerRule(
    name="sgd",
    kinds=(StateKind("momentum_buffer"),),
    settings=_settings,
    update_blocks=_update_blocks,
    reference=_reference,
    constants=("weight_decay",),
    own_keys=(OwnKey("momentum", float, 0.9), OwnKey("nesterov", bool, False)),
    problems=_problems,
)
"""SGD with momentum; weight decay is a part of the gradient, as in torch.optim.SGD."""
