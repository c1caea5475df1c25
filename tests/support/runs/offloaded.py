"""A model whose every activation an offloader may send, and its gradients step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from holdfast.parallel.offload import Offloader

ROWS, WIDTH = 64, 128
BYTES = ROWS * WIDTH * 4


class Stack(nn.Module):
    """Layers whose every activation is of `BYTES` bytes."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.seen: list[StorageWeakRef] = []

    def forward(self, value: Tensor) -> Tensor:
        for layer in self.layers:
            value = layer(value).tanh()
            self.seen.append(StorageWeakRef(value.untyped_storage()))
        return value.square().mean()


def inputs() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module, total: Tensor) -> list[Tensor]:
    """The gradients of a loss; the model's own are left empty."""
    model.zero_grad()
    total.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def steps(model: nn.Module, offloader: Offloader, count: int = 4) -> list[list[Tensor]]:
    """The gradients of steps that send what they save, all written before the backward passes."""
    found = []
    for _ in range(count):
        with offloader:
            total = model(inputs())
            offloader.drain()
            found.append(gradients(model, total))
    return found
