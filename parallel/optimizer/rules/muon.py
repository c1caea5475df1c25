"""Muon (Jordan et al. 2024): momentum made orthogonal, for matrices; AdamW for all else.

A matrix is updated whole, also one whose boxes lie in several parts, from operands that lie in
memory of their own, so that owners and shadows compute the same products. Importing it needs no
torch. Exact-mode safe. Local.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from holdfast.parallel.optimizer.rules.adamw import ADAMW, AdamWSettings
from holdfast.parallel.optimizer.rules.rule import (
    BlockUpdate,
    MatrixRule,
    OptimizerRule,
    OwnKey,
    by_matrix,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Those of the quintic iteration, with the steepest slope at zero (Jordan et al. 2024)."""
_LEAST_NORM = 1e-7
"""A matrix of a smaller norm is not scaled up to norm 1."""


@dataclass(frozen=True, slots=True)
class MuonSettings:
    """The constants of Muon."""

    adamw: AdamWSettings
    """Those of the parameters that are no matrices, and the weight decay of all."""
    momentum: float
    nesterov: bool
    iterations: int
    """The Newton-Schulz iterations of an update."""
    precision: Literal["bf16", "full"]
    """That of the iterations."""
    scale: Literal["match_rms_adamw", "original"]


def _settings(section: Any) -> MuonSettings:
    """The constants from the `[optimizer]` section, which has fields of these names."""
    return MuonSettings(
        ADAMW.settings(section),
        section.muon_momentum,
        section.muon_nesterov,
        section.muon_iterations,
        section.muon_precision,
        section.muon_scale,
    )


def _problems(section: Any) -> Iterator[str]:
    if not 0 <= section.muon_momentum < 1:
        yield (
            f"optimizer.muon_momentum = {section.muon_momentum}: must be at least 0 and less than 1"
        )
    if not 1 <= section.muon_iterations < 100:
        yield f"optimizer.muon_iterations = {section.muon_iterations}: must be 1 to 99"


def _update_blocks(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: MuonSettings
) -> None:
    ADAMW.update_blocks(updates, step, lr, settings.adamw)


def _update_matrices(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: MuonSettings
) -> None:
    import torch

    for boxes in by_matrix(updates):
        matrix = boxes[0].matrix
        assert matrix is not None
        # A tensor of its own, even where it is only a copy: see the module's docstring.
        moved = torch.empty(
            matrix.rows, matrix.columns, dtype=boxes[0].master.dtype, device=boxes[0].master.device
        )
        for update in boxes:
            _of(update, moved).copy_(_moved(update, settings))
        direction = _orthogonal(moved, settings)
        rate = _scaled(lr, matrix.rows, matrix.columns, settings.scale)
        for update in boxes:
            if update.decays:
                update.master.mul_(1.0 - lr * settings.adamw.weight_decay)
            scaled = _of(update, direction).to(update.master.dtype).mul_(rate)
            update.master.sub_(scaled.reshape(-1))


def _moved(update: BlockUpdate, settings: MuonSettings) -> Tensor:
    """The new momentum of a block, or what Nesterov's rule makes of it, in the shape of its box."""
    assert update.matrix is not None
    momentum, change = update.state[0], update.gradient * (1.0 - settings.momentum)
    momentum.mul_(settings.momentum).add_(change)
    moved = momentum.mul(settings.momentum).add_(change) if settings.nesterov else momentum
    return moved.view(update.matrix.box.shape)


def _of(update: BlockUpdate, matrix: Tensor) -> Tensor:
    """The box of a matrix that a block has."""
    assert update.matrix is not None
    return matrix[update.matrix.box.slices]


def _orthogonal(matrix: Tensor, settings: MuonSettings) -> Tensor:
    """A matrix with about the same singular vectors, and singular values near 1."""
    import torch

    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.bfloat16() if settings.precision == "bf16" else matrix
    found = found.t().contiguous() if is_tall else found
    found = found / found.norm().clamp(min=_LEAST_NORM)
    for _ in range(settings.iterations):
        gram = found @ found.t()
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.addmm(found, polynomial, found, beta=a)
    return found.t().contiguous() if is_tall else found


def _scaled(lr: float, rows: int, columns: int, scale: str) -> float:
    """The learning rate of a matrix of a shape, as torch.optim.Muon's `adjust_lr_fn` has it."""
    if scale == "original":
        return lr * math.sqrt(max(1.0, rows / columns))
    return lr * 0.2 * math.sqrt(max(rows, columns))


def _reference(
    groups: Sequence[tuple[list[nn.Parameter], bool]], settings: MuonSettings
) -> torch.optim.Optimizer:
    return ADAMW.reference(groups, settings.adamw)


def _matrix_reference(
    groups: Sequence[tuple[list[nn.Parameter], bool]], settings: MuonSettings
) -> torch.optim.Optimizer:
    import torch

    decay = settings.adamw.weight_decay
    found = [{"params": p, "weight_decay": decay if decays else 0.0} for p, decays in groups if p]
    if settings.precision == "bf16":
        return torch.optim.Muon(
            found,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            ns_steps=settings.iterations,
            adjust_lr_fn=settings.scale,
        )

    class Muon(torch.optim.Optimizer):
        """Muon with iterations in the parameters' precision, by powers of the Gram matrix."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:  # pyrefly: ignore
            """Update all parameters; `closure` is not called."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    state, gradient = self.state[parameter], parameter.grad
                    before = state.get("momentum", torch.zeros_like(parameter))
                    state["momentum"] = torch.lerp(gradient, before, settings.momentum)
                    value = state["momentum"]
                    if settings.nesterov:
                        value = torch.lerp(gradient, value, settings.momentum)
                    value = value / value.norm().clamp(min=_LEAST_NORM)
                    for _ in range(settings.iterations):
                        gram = value.T @ value
                        first, third, fifth = _COEFFICIENTS
                        value = value @ (
                            first * torch.eye(len(gram), dtype=gram.dtype)
                            + third * gram
                            + fifth * gram @ gram
                        )
                    rows, columns = parameter.shape
                    rate = _scaled(group["lr"], rows, columns, settings.scale)
                    decayed = parameter * (1.0 - group["lr"] * group["weight_decay"])
                    parameter.copy_(decayed - rate * value)

    return Muon(found, {"lr": 0.0})


MUON = OptimizerRule(
    name="muon",
    kinds=ADAMW.kinds,
    settings=_settings,
    update_blocks=_update_blocks,
    reference=_reference,
    matrices=MatrixRule(_update_matrices, _matrix_reference),
    own_keys=(
        OwnKey("muon_momentum", float, 0.95),
        OwnKey("muon_nesterov", bool, True),
        OwnKey("muon_iterations", int, 5),
        OwnKey("muon_precision", Literal["bf16", "full"], "bf16"),
        OwnKey("muon_scale", Literal["match_rms_adamw", "original"], "match_rms_adamw"),
    ),
    problems=_problems,
    in_checks={"muon_precision": "full"},
)
"""Muon, with AdamW for what is no matrix of a transformer layer. Its momentum is `exp_avg`."""
