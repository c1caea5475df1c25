"""Lion (Chen et al. 2023): the sign of an interpolated momentum. Importing it needs no torch.

Every operation rounds once and is elementwise: neither the grouping of blocks nor their cut affects
the result. Exact-mode safe. Local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.parallel.optimizer.rules.rule import BlockUpdate, OptimizerRule, StateKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LionSettings:
    """The constants of Lion."""

    betas: tuple[float, float]
    weight_decay: float


def _settings(section: Any) -> LionSettings:
    """The constants from the `[optimizer]` section, which has fields of these names."""
    return LionSettings((section.betas[0], section.betas[1]), section.weight_decay)


def _update_blocks(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: LionSettings
) -> None:
    first, second = settings.betas
    for update in updates:
        [momentum] = update.state
        direction = (momentum * first).add_(update.gradient * (1.0 - first)).sign_()
        if update.decays:
            update.master.mul_(1.0 - lr * settings.weight_decay)
        update.master.sub_(direction.mul_(lr))
        momentum.mul_(second).add_(update.gradient * (1.0 - second))


def _reference(
    groups: Sequence[tuple[list[nn.Parameter], bool]], settings: LionSettings
) -> torch.optim.Optimizer:
    import torch

    class Lion(torch.optim.Optimizer):
        """Lion, parameter by parameter."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:  # pyrefly: ignore
            """Update all parameters; `closure` is not called."""
            first, second = settings.betas
            for group in self.param_groups:
                for parameter in group["params"]:
                    before = self.state[parameter].get("exp_avg", torch.zeros_like(parameter))
                    gradient = parameter.grad
                    moved = torch.lerp(gradient, before, first).sign()
                    decayed = parameter * (1.0 - group["lr"] * group["weight_decay"])
                    parameter.copy_(decayed - group["lr"] * moved)
                    self.state[parameter]["exp_avg"] = torch.lerp(gradient, before, second)

    found = [
        {"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0}
        for parameters, decays in groups
    ]
    return Lion(found, {"lr": 0.0})


LION = OptimizerRule(
    name="lion",
    kinds=(StateKind("exp_avg"),),
    settings=_settings,
    update_blocks=_update_blocks,
    reference=_reference,
    constants=("betas", "weight_decay"),
)
"""Lion, with one moment."""
