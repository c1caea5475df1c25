"""Modules wait for the parameters that they use, also for those of containers in them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from holdfast.parallel.optimizer.exchange.parameters import ParameterArrival


class _Pair(nn.Module):
    """Two matrices, without a forward pass of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ParameterList(torch.ones(2, 2) for _ in range(2))
        self.second = nn.Parameter(torch.ones(2, 2))


class _User(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(_Pair() for _ in range(2))
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.inner = nn.Linear(2, 2)

    def forward(self, value: Tensor) -> Tensor:
        for pair in self.pairs:
            value = value @ pair.second @ pair.first[0]  # pyrefly: ignore
        return self.inner(value @ self.weight)


def test_parameters_of_containers_are_awaited_by_the_module_around_them() -> None:
    user, used = _User(), list[set[nn.Parameter]]()

    class Watched(ParameterArrival):
        def use(self, parameters: Iterable[nn.Parameter]) -> None:
            used.append(set(parameters))

    Watched().watch(user)
    user(torch.ones(1, 2))
    assert used == [
        {user.weight, *user.pairs.parameters()},
        {user.inner.weight, user.inner.bias},
    ]
