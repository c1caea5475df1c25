"""Tensor and sequence parallelism: the collectives within a tensor-parallel group.

The operators are f and g of Shoeybi et al. 2019, and those of Korthikanti et al. 2022 for sequence
parallelism. A hidden state is float[seq, batch, hidden] on every rank or, with sequence
parallelism, float[seq / T, batch, hidden]. Exact-mode safe within one tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import Communicator
from holdfast.parallel.pipeline import WeightGradientQueue
from holdfast.parallel.tensor_parallel.linear import (
    gather_rows,
    gathered_linear,
    linear,
    sum_scatter_rows,
)


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The split of a chunk's layers: the group (None: one rank), and of sequences or not."""

    group: Communicator | None
    sequence_parallel: bool

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size

    @property
    def index(self) -> int:
        return 0 if self.group is None else self.group.index

    def column_linear(
        self, value: Tensor, weight: nn.Parameter, queue: WeightGradientQueue
    ) -> Tensor:
        """A layer with split output features; every rank then has the whole sequence."""
        if self.group is None:
            return linear(value, weight, queue)
        if self.sequence_parallel:
            return gathered_linear(value, weight, queue, self.group)
        return linear(copy_to_group(value, self.group), weight, queue)

    def row_linear(self, value: Tensor, weight: nn.Parameter, queue: WeightGradientQueue) -> Tensor:
        """A layer with split input features; the ranks' partial outputs are summed."""
        return self.sum_partials(linear(value, weight, queue))

    def sum_partials(self, value: Tensor) -> Tensor:
        """The sum of the ranks' partial hidden states, split by sequence if that is on."""
        if self.group is None:
            return value
        if self.sequence_parallel:
            return scatter_sum(value, self.group)
        return sum_over_group(value, self.group)

    def element_offset(self, value: Tensor) -> int:
        """The index of a hidden state's first element in the logical [seq, batch, hidden]."""
        return self.index * value.numel() if self.sequence_parallel else 0


def copy_to_group(value: Tensor, group: Communicator) -> Tensor:
    """Identity; the gradient is summed over the group. Collective in backward."""
    return _CopyToGroup.apply(value, group)  # pyrefly: ignore[bad-return]


def sum_over_group(value: Tensor, group: Communicator) -> Tensor:
    """Sum over the group; the gradient passes unchanged. Collective in forward."""
    return _SumOverGroup.apply(value, group)  # pyrefly: ignore[bad-return]


def scatter_sum(value: Tensor, group: Communicator) -> Tensor:
    """Sum over the group, split along dim 0; the gradient is gathered. Collective."""
    return _ScatterSum.apply(value, group)  # pyrefly: ignore[bad-return]


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        gradient = grad_output.clone(memory_format=torch.contiguous_format)
        ctx.group.all_reduce(gradient).wait()
        return gradient, None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Communicator) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        group.all_reduce(total).wait()
        return total

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return sum_scatter_rows(value, group)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad_output, ctx.group), None
