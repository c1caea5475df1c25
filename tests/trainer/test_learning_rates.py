"""A learning-rate schedule is one function and one line of the registry."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.trainer import learning_rates
from holdfast.trainer.config.loading import load_config
from holdfast.trainer.step.learning_rate import rate_of

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
