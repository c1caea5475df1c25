"""Ranks for convert.py: DeepSpeed and torch.distributed.checkpoint save a state of the size that
is asked for.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store

HIDDEN, VOCAB = 1024, 32000


class Model(nn.Module):
    """The matrices of a small language model, in the sizes that they have."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.up = nn.ModuleList(nn.Linear(HIDDEN, 4 * HIDDEN) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * HIDDEN, HIDDEN) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Linear(HIDDEN, 4 * HIDDEN, bias=False) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for up, down, mix in zip(self.up, self.down, self.mix, strict=True):
            hidden = hidden + down(torch.relu(up(hidden)) * mix(hidden))
        return hidden.float().square().mean()


def save_deepspeed(
    rank: int, world_size: int, store: Store, *, stage: int, layers: int, folder: str
) -> None:
    """One step of DeepSpeed's own, and its checkpoint."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        DS_ACCELERATOR="cpu",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    import deepspeed

    model = Model(layers)
    parameters: Any = list(model.parameters())
    config = {
        "train_batch_size": world_size,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    loss = engine(torch.arange(4)[None])
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(folder, tag="global_step1")


def save_dcp(rank: int, world_size: int, store: Store, *, layers: int, folder: str) -> None:
    """Weights as FSDP2 keeps them, saved by torch."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    weights = {
        name: distribute_tensor(value, mesh, [Shard(0)])
        for name, value in Model(layers).state_dict().items()
    }
    dcp.save({"model": weights}, checkpoint_id=folder)
