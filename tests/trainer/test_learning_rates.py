"""A learning-rate schedule is one function and one line of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import HashStore

from holdfast.parallel.errors import ConfigError
from holdfast.trainer import learning_rates
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.loading import load_config
from holdfast.trainer.loop import train
from holdfast.trainer.run.run_directory import RunDirectory
from holdfast.trainer.step.learning_rate import rate_of
from holdfast.trainer.worlds.world import local_world
from support.runs.small_runs import make_config, metrics_of

TABLE = """
[model]
family = "llama"
layers = 6
hidden = 96
[optimizer]
lr = 1.0
min_lr = 0.1
warmup_steps = 2
schedule = "halving"
"""


def halving(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    return max(min_lr, lr * 0.5 ** (step - warmup_steps))


def test_a_registered_schedule_is_allowed_and_followed(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(TABLE)
    with pytest.raises(ConfigError, match=r"optimizer\.schedule = 'halving': allowed are 'cosine'"):
        load_config(path)
    with mock.patch.dict(learning_rates.LEARNING_RATES, halving=halving):
        config = load_config(path)
        assert [rate_of(config, step) for step in range(7)] == [0.5, 1, 1, 0.5, 0.25, 0.125, 0.1]


def train_with(schedule: str, root: Path) -> list[dict[str, Any]]:
    """The lines of a short run with a schedule, in this process."""
    config: RunConfig = make_config(
        model={"layers": 1, "hidden": 8, "intermediate": 8, "heads": 2, "kv_heads": 2},
        train={"steps": 5, "seq_len": 4, "global_batch": 4},
        optimizer={"schedule": schedule, "lr": 0.1, "min_lr": 0.01, "warmup_steps": 2},
    )
    root.mkdir()
    mode = torch.get_deterministic_debug_mode()
    try:
        train(config, local_world(0, 1), HashStore(), RunDirectory(root))
    finally:
        torch.set_deterministic_debug_mode(mode)
    return metrics_of(root)


def test_a_registered_schedule_trains(tmp_path: Path) -> None:
    with mock.patch.dict(learning_rates.LEARNING_RATES, halving=halving):
        halved = train_with("halving", tmp_path / "halved")
    stayed = train_with("constant", tmp_path / "stayed")
    assert [line["lr"] for line in halved] == [0.05, 0.1, 0.1, 0.05, 0.025]
    equal = [a["loss_hex"] == b["loss_hex"] for a, b in zip(halved, stayed, strict=True)]
    assert equal == [True, True, True, True, False], "step 4 is the first with another rate"
