"""Jobs for the pool: DeepSpeed trains a small model with ZeRO, saves, and goes on from what it
is given.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store

BATCH = 12
IMPORTS = (
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.utils.zero_to_fp32",
    "transformers.models.llama.modeling_llama",
)
"""What a pool imports before it forks its workers."""
ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}
"""Of a pool."""


class Small(nn.Module):
    """Sizes that no number of ranks divides; a buffer; two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 10)
        self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])
        self.head = nn.Linear(10, 7, bias=False)
        self.register_buffer("scale", torch.tensor([1.5, 2.5]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return (self.head(hidden).float() * self.scale.float()[0]).square().mean()


def _open(rank: int, world_size: int, store: Store) -> None:
    """Make this process a rank of DeepSpeed's, over gloo."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    import deepspeed

    # It would compile sums in shared memory at its first use, for a minute, and wait for ever for a
    # compilation that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_deepspeed(
    rank: int, world_size: int, store: Store, *, cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Train each case (see `_train`); DeepSpeed keeps the first process group for ever, so all
    use one.
    """
    _open(rank, world_size, store)
    return [_train(rank, world_size, **case) for case in cases]


def _train(
    rank: int,
    world_size: int,
    *,
    stage: int,
    precision: str,
    steps: int,
    save_at: int = 0,
    folder: str = "",
    load: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Train `steps` steps on the same batches whatever the number of ranks; the losses of each.

    Args:
        save_at: the step after which a checkpoint is written to `folder`.
        load: (folder, tag) of a universal checkpoint to begin with.
    """
    import deepspeed

    torch.manual_seed(5)
    model = Small()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups: Any = [
        {"params": decayed},
        {"params": others, "weight_decay": 0.0},
    ]
    if stage == 3:
        groups = [{"params": list(model.parameters())}]
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.01},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "checkpoint": {"load_universal": load is not None},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    first = 0
    if load is not None:
        path, _ = engine.load_checkpoint(*load)
        assert path is not None
        first = engine.global_steps
    losses = []
    for step in range(first, steps):
        batch = torch.randint(37, (BATCH, 4), generator=torch.Generator().manual_seed(step))
        loss = engine(batch.chunk(world_size)[rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach().float()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
        if step + 1 == save_at:
            engine.save_checkpoint(folder, tag=f"global_step{save_at}")
    return {"losses": losses, "first": first}


def run_tensor_parallel(
    rank: int, world_size: int, store: Store, *, stages: list[int], root: str
) -> None:
    """Two steps of a transformers model on 2 tensor-parallel ranks x the rest, saved for each
    ZeRO stage.
    """
    _open(rank, world_size, store)
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    for stage in stages:
        torch.manual_seed(1)
        sizes = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
            "tensor_parallel": {"autotp_size": 2},
        }
        engine, *_ = deepspeed.initialize(model=LlamaForCausalLM(sizes), config=config)
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank // 2)
            tokens = torch.randint(64, (2, 8), generator=generator)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        engine.save_checkpoint(f"{root}/tensor-{stage}", tag="global_step2")


def consolidate(
    rank: int, world_size: int, store: Store, *, folders: list[str], tag: str
) -> list[Any]:
    """DeepSpeed's own consolidation of each checkpoint: every weight in 32 bits."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return [get_fp32_state_dict_from_zero_checkpoint(folder, tag) for folder in folders]


def make_universal(
    rank: int, world_size: int, store: Store, *, pairs: list[tuple[str, str]]
) -> None:
    """Convert each (source, target) with DeepSpeed's own converter."""
    from deepspeed.checkpoint import ds_to_universal

    for source, target in pairs:
        command = ["ds_to_universal", "--input_folder", source, "--output_folder", target]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        with mock.patch.object(sys, "argv", [*command, "--inject_missing_state"]):
            ds_to_universal.main(ds_to_universal.parse_arguments())
