"""Sums over the parts of a layer and over the ranks of a tensor group, without autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a power of two of tensors in a binary tree of neighbours. They are overwritten.

    Each half of the tree is a tree, so that ranks may have one of its branches each. Local.
    """
    values = list(parts)
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [first.add_(second) for first, second in pairs]
    return values[0]


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, one after another. The first is overwritten."""
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total


def tree_everywhere(value: Tensor, group: Communicator) -> Tensor:
    """The members' sum, added in a binary tree, at every member. Collective; for small tensors."""
    received = [torch.empty_like(value) for _ in range(group.size)]
    group.all_gather(received, value.contiguous()).wait()
    return tree_sum(received)
