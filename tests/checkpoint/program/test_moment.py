"""What is saved is what was there when `save` was called, however the program changes it then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.checkpoint import Checkpointer, load


def _by_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[:] = 0


def _by_copy(weight: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.zeros_like(weight))


def _by_set(weight: Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def _by_storage(weight: Tensor) -> None:
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(weight.numel() * 4)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "copy_ under no_grad": _by_copy,
    "tensor.data.zero_": lambda weight: weight.data.zero_(),
    "a new tensor.data": _by_set,
    "a numpy view": _by_numpy,
    "a storage that is freed": _by_storage,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_right_after_save_does_not_reach_the_checkpoint(tmp_path: Path, edit: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(800, 800)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moment = optimizer.state[model.weight]["exp_avg"]
    before, average = model.weight.detach().clone(), moment.clone()
    schedule = {"lr": [1.0]}
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    with Checkpointer(tmp_path, state) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step)
            EDITS[edit](model.weight)
            EDITS[edit](moment)
            schedule["lr"].append(2.0)
            checkpointer.wait()
            with torch.no_grad():
                model.weight.copy_(before)
                moment.copy_(average)
    for step in (1, 2):
        again = nn.Linear(800, 800)
        other = torch.optim.AdamW(again.parameters())
        found = load(tmp_path / f"step-{step:08d}", {"model": again, "optimizer": other})
        assert torch.equal(again.weight, before)
        assert torch.equal(other.state[again.weight]["exp_avg"], average)
        assert found["schedule"] == {"lr": [1.0] + [2.0] * (step - 1)}
