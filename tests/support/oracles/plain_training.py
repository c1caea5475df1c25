"""A run in this process, beside a plain loop from the same weights on the same data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import open_dataset
from holdfast.trainer.models.chunk import build_whole_model
from support.oracles.plain_llama import PlainLlama, Shape, train_plainly
from support.runs.sequences import windows_of
from support.runs.small_runs import make_config, train_in, train_steps

Optimizers = Callable[[PlainLlama], Sequence[torch.optim.Optimizer]]
RATE = 3e-3


def twenty_steps(**sections: dict[str, Any]) -> RunConfig:
    """Steps of a constant learning rate, in float64."""
    sizes = {"steps": 20, "global_batch": 4, "micro_batch": 2, "precision": "fp64"}
    given = sections.pop("optimizer", {})
    constant = {"schedule": "constant", "warmup_steps": 0, "lr": RATE, "min_lr": 0.0, **given}
    model = {"dropout": 0.0, "layers": 2, **sections.pop("model", {})}
    return make_config(model=model, train=sizes, optimizer=constant, **sections)


def assert_equal_steps(config: RunConfig, optimizers: Optimizers, *, rel: float = 1e-8) -> None:
    """The losses and gradient norms of a run are those of a plain loop with some optimizers."""
    model, train = config.model, config.train
    shape = {key: getattr(model, key) for key in Shape.__dataclass_fields__}
    plain = PlainLlama(Shape(**shape)).double()
    chunk = build_whole_model(
        model,
        dtype=torch.float64,
        device=torch.device("cpu"),
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        seed=train.seed,
    )
    plain.load_named(
        {
            spec.name: parameter.detach()[spec.local_row : spec.local_row + spec.rows]
            for (*_, spec), parameter in chunk.rows()
            if spec.tied_use == 0
        }
    )
    data = open_dataset(config.data, vocab=model.vocab, seq_len=train.seq_len, seed=train.seed)

    def batches(step: int) -> Tensor:
        first = step * train.global_batch
        rows = [windows_of(data.sample(first + row)) for row in range(train.global_batch)]
        return torch.from_numpy(np.concatenate(rows))

    expected = train_plainly(
        plain,
        batches,
        lambda step: config.optimizer.lr,
        steps=train.steps,
        micro_batch=train.micro_batch,
        optimizers=optimizers(plain),
    )
    found = run_here(config)
    losses, norms = ([float.fromhex(value) for value in found[key]] for key in ("losses", "norms"))
    assert losses == pytest.approx([record.loss for record in expected], rel=rel)
    assert norms == pytest.approx([record.grad_norm for record in expected], rel=10 * rel)


def train_here(config: RunConfig, root: Path, **arguments: Any) -> None:
    """Run the training loop of one rank in a run's folder, in this process."""
    mode = torch.get_deterministic_debug_mode()
    try:
        plain = msgspec.to_builtins(config)
        train_in(0, 1, HashStore(), config=plain, root=str(root), **arguments)
    finally:
        torch.set_deterministic_debug_mode(mode)


def run_here(config: RunConfig) -> dict[str, Any]:
    """What `train_steps` gives for a run of one rank, in this process."""
    mode = torch.get_deterministic_debug_mode()
    try:
        return train_steps(0, 1, HashStore(), config=msgspec.to_builtins(config))
    finally:
        torch.set_deterministic_debug_mode(mode)
