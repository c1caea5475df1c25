"""Jobs for the pool: FSDP2 trains a small model, and torch.distributed.checkpoint saves and
loads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import Store
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor


class Small(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 10)
        self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])
        self.head = nn.Linear(10, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return self.head(hidden).square().mean()


def full_state(values: dict[str, Any]) -> dict[str, Tensor]:
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in values.items()}


def run_fsdp(
    rank: int, world_size: int, store: Store, *, folder: str, load: str = "", steps: int = 3
) -> dict[str, Any]:
    """Train (or load), save to `folder` where it is given, and tell every tensor and what came
    next.
    """
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.manual_seed(11)
        model: Any = Small()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))

        def train(count: int, seed: int) -> list[float]:
            losses = []
            for step in range(count):
                tokens = torch.randint(
                    37, (5,), generator=torch.Generator().manual_seed(seed + step)
                )
                loss = model(tokens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        if load:
            train(1, 1000)  # other values and an optimizer state to be replaced
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optim": optimizer_state}
            dcp.load(state, checkpoint_id=load)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optim"],
            )
        else:
            train(steps, 0)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        if folder:
            Path(folder).parent.mkdir(exist_ok=True)
            dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder)
        found = full_state(model_state)
        states: dict[str, Any] = optimizer_state["state"]  # type: ignore[assignment]
        for name, values in states.items():
            found |= {f"{kind}.{name}": v for kind, v in full_state(values).items()}
        return {"tensors": {n: v.clone() for n, v in found.items()}, "losses": train(2, 500)}
    finally:
        dist.destroy_process_group()
