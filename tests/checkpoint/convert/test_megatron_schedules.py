"""The schedule that Megatron goes on with is the run's, in Megatron's own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.checkpoint.convert.formats.megatron.writing import DECAY_STYLES, scheduler_state
from holdfast.checkpoint.convert.sources import Catalog
from holdfast.parallel.errors import CheckpointError
from holdfast.trainer.learning_rates import LEARNING_RATES, Stage, learning_rate


def catalog(schedule: str, **settings: Any) -> Catalog:
    settings = {"schedule": schedule, "lr": 1.0, **settings}
    config = {"optimizer": settings, "train": {"steps": 10}}
    return Catalog("holdfast", Path(), [], step=5, config=config)


@pytest.mark.parametrize("schedule", sorted(DECAY_STYLES.keys() - {"inverse-sqrt"}))
def test_megatron_knows_the_schedule_that_is_written(schedule: str) -> None:
    scheduler = _megatron_scheduler(scheduler_state(catalog(schedule), 0))
    rates = []
    for _ in range(5):
        scheduler.step(1)
        rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
    expected = {"constant": 1.0, "wsd": 0.0, "cosine": 0.0, "linear": 0.0}[schedule]
    assert rates[-1] == pytest.approx(expected)
    assert (rates[0] == 1.0) == (schedule in ("constant", "wsd"))


def test_the_inverse_square_root_goes_on_with_our_rates() -> None:
    settings = {"warmup_steps": 3, "min_lr": 0.6}
    scheduler = _megatron_scheduler(scheduler_state(catalog("inverse-sqrt", **settings), 0))
    stage = Stage(schedule="inverse-sqrt", lr=1.0, **settings)
    for step in range(5, 10):
        scheduler.step(1)  # the rate of the update after as many steps
        rate = learning_rate(step, steps=10, stages=[stage])
        assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def _megatron_scheduler(state: dict[str, Any]) -> Any:
    """Megatron's scheduler with the state that is written."""
    pytest.importorskip("megatron.core")
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = OptimizerParamScheduler(
        torch.optim.AdamW(nn.Linear(1, 1).parameters()),  # pyrefly: ignore
        init_lr=0.0,
        max_lr=state["max_lr"],
        min_lr=state["min_lr"],
        lr_warmup_steps=state["lr_warmup_steps"],
        lr_decay_steps=state["lr_decay_steps"],
        lr_decay_style=state["lr_decay_style"],
        start_wd=state["start_wd"],
        end_wd=state["end_wd"],
        wd_incr_steps=state["wd_incr_steps"],
        wd_incr_style=state["wd_incr_style"],
        wsd_decay_steps=2,
        lr_wsd_decay_style="linear",
    )
    scheduler.load_state_dict(state)
    return scheduler


def test_a_schedule_without_counterpart_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.schedule = 'wsdd'.* did you mean 'wsd'"):
        scheduler_state(catalog("wsdd"), 0)


@pytest.mark.parametrize(
    ("schedule", "settings", "said"),
    [
        ("inverse-sqrt", {}, "no warm-up"),
        ("cosine", {"decay_steps": 3}, r"optimizer\.decay_steps = 3"),
        ("constant", {"lr_stages": [{"start": 5}]}, r"optimizer\.lr_stages"),
    ],
)
def test_what_megatrons_schedules_lack_is_named(
    schedule: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        scheduler_state(catalog(schedule, **settings), 0)


def test_every_schedule_of_ours_has_a_counterpart() -> None:
    assert LEARNING_RATES.keys() == DECAY_STYLES.keys()
