"""Offload from a GPU: to a drive by way of pinned memory, and to pinned memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from holdfast.parallel.offload import Bounds, Offloader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: run it on a GPU machine with a CUDA build of torch",
    ),
]

ROWS, WIDTH, LAYERS = 4096, 1024, 12


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
    return nn.Sequential(*layers).cuda()


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(torch.ones(ROWS, WIDTH, device="cuda")).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("where", ["ssd", "host"])
def test_gradients_are_those_of_torch(where: str, tmp_path: Path, model: nn.Module) -> None:
    expected = gradients(model)
    offloader = Offloader(tmp_path if where == "ssd" else None, bounds=Bounds(1.0, 1.0))
    for _ in range(6):
        with offloader:
            found = gradients(model)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert offloader.last_step.sent_bytes > 0
    offloader.close()


@pytest.mark.parametrize("where", ["ssd", "host"])
def test_memory_is_free_between_the_passes(where: str, tmp_path: Path, model: nn.Module) -> None:
    offloader = Offloader(tmp_path if where == "ssd" else None, bounds=Bounds(1.0, 1.0))
    value = torch.ones(ROWS, WIDTH, device="cuda")
    before = torch.cuda.memory_allocated()
    model(value).square().mean().backward()
    model.zero_grad()
    with offloader:
        total = model(value).square().mean()
        torch.cuda.synchronize()
        offloader.drain()
        kept = torch.cuda.memory_allocated() - before
        total.backward()
    assert kept < (LAYERS * ROWS * WIDTH * 4) // 2
    offloader.close()
