"""The router: which experts a token goes to, and with what weights. Local.

Scores are float32 or wider. The choice is made once and kept: what is computed again takes the same
experts. Each row of tokens is decided by itself, so exact-mode safe where the rows of a call are
the same in every layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.pipeline import WeightGradientQueue

ScoreFunction = Literal["softmax", "sigmoid"]
LOAD_UNIT = 2.0**-8
"""What a choice counts in the gradient of a router's bias: a power of two, so that sums are exact,
which leaves room in integer sums for 2 ** 27 choices of an expert in a step."""
_LEAST_SUM = 1e-20
"""Added to the sum of the chosen scores of a sigmoid, so that it divides."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The experts of some tokens."""

    experts: Tensor
    """int64[tokens, experts per token]: the best score first, of equal ones the lowest expert."""
    weights: Tensor
    """float[tokens, experts per token], float32 or wider."""
    shares: Tensor
    """float[tokens, experts]: each token's scores over all experts, with the sum 1."""
    logsumexp: Tensor
    """float[tokens], of the logits."""


@dataclass(frozen=True, slots=True)
class Router:
    """The rule by which scores become choices."""

    per_token: int
    """The experts that a token goes to."""
    score: ScoreFunction = "softmax"
    normalizes: bool = True
    """Whether the weights of a token's experts have the sum 1."""
    scale: float = 1.0
    """The factor of the weights."""
    groups: int = 1
    """Experts lie in so many groups of equal size."""
    group_limit: int = 0
    """The groups that a token's experts may lie in: those with the best sums of their two best
    scores (DeepSeek-AI 2024); 0: all."""

    def choose(
        self, logits: Tensor, bias: Tensor | None = None, kept: Tensor | None = None
    ) -> Choices:
        """The choices of some tokens.

        Args:
            logits: float[tokens, experts], float32 or wider.
            bias: float[experts]: added to scores for the choice only.
            kept: int64[tokens, experts per token]: experts that were chosen before.
        """
        if self.score == "softmax":
            scores = torch.softmax(logits, -1)
            shares = scores
        else:
            scores = torch.sigmoid(logits)
            shares = scores / (scores.sum(-1, keepdim=True) + _LEAST_SUM)
        experts = self._best(scores.detach(), bias) if kept is None else kept
        weights = scores.gather(1, experts)
        if self.normalizes:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total if self.score == "softmax" else total + _LEAST_SUM)
        if self.scale != 1.0:
            weights = weights * self.scale
        return Choices(experts, weights, shares, torch.logsumexp(logits, -1))

    def _best(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """The experts with the best scores, of equal ones the lowest."""
        if bias is not None:
            scores = scores + bias
        if self.group_limit:
            by_group = scores.view(len(scores), self.groups, -1)
            of_groups = by_group.topk(min(2, by_group.shape[2]), dim=-1).values.sum(-1)
            allowed = _first(of_groups, self.group_limit)
            mask = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, allowed, True)
            scores = by_group.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(1)
        return _first(scores, self.per_token)


def _first(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores, of equal ones the lowest: torch.topk does not say which."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def balance_loss(choices: Choices, counts: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """The auxiliary loss of sequences, which is least for even choices, times their tokens.

    Of each sequence it is E / (k T) * sum over experts of count * sum of shares (Fedus et al. 2021;
    per sequence as DeepSeek-AI 2024), so that the mean over tokens is 1 where choices are even.

    Args:
        choices: of tokens of several sequences.
        counts: int64[sequences, experts]: the tokens of each sequence that chose an expert,
            whatever rank has them.
        rows: int64[tokens]: the sequence of each token here.
        tokens: int64[sequences]: the tokens of each.
    Returns:
        A scalar, of the tokens here.
    """
    experts = choices.shares.shape[1]
    of_experts = counts.to(choices.shares.dtype) * experts
    factor = of_experts / (choices.experts.shape[1] * tokens.clamp(min=1)[:, None])
    return (factor[rows] * choices.shares).sum()


def add_gradient(
    value: Tensor, parameter: nn.Parameter, gradient: Tensor, queue: WeightGradientQueue
) -> Tensor:
    """`value` as it is; what it leads to gives `parameter` this gradient, whatever that is.

    A sink gets it as it is: rounded to 16 bits, loads above 256 would not be what was counted.
    Without a sink autograd rounds it to the parameter's type.
    """
    return _AddGradient.apply(  # pyrefly: ignore[bad-return]
        value, parameter, gradient, queue
    )


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        parameter: nn.Parameter,
        gradient: Tensor,
        queue: WeightGradientQueue,
    ) -> Tensor:
        ctx.parameter, ctx.gradient, ctx.queue = parameter, gradient, queue
        return value.view_as(value)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if ctx.queue.has_sink:
            ctx.queue.add(ctx.parameter, ctx.gradient)
            return gradient, None, None, None
        return gradient, ctx.gradient.to(ctx.parameter.dtype), None, None


def add_loss(value: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`value` as it is, and `loss` times `scale` in the gradient of what `value` leads to."""
    return _AddLoss.apply(value, loss, scale)  # pyrefly: ignore[bad-return]


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.loss = (loss.dtype, loss.device, scale)
        return value.view_as(value)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device, scale = ctx.loss
        return gradient, torch.tensor(scale, dtype=dtype, device=device), None


def logits_of(value: Tensor, weight: Tensor) -> Tensor:
    """float[tokens, experts], float32 or wider."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return F.linear(value.to(wide), weight.to(wide))
