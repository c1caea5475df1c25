"""The schedule that Megatron goes on with is the run's, in Megatron's own words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.checkpoint.convert.formats.megatron.writing import DECAY_STYLES, scheduler_state
from holdfast.checkpoint.convert.sources import Catalog
from holdfast.parallel.errors import CheckpointError
from holdfast.trainer.learning_rates import LEARNING_RATES


def catalog(schedule: str) -> Catalog:
    config = {"optimizer": {"schedule": schedule, "lr": 1.0}, "train": {"steps": 10}}
    return Catalog("holdfast", Path(), [], step=5, config=config)


@pytest.mark.parametrize("schedule", DECAY_STYLES)
def test_megatron_knows_the_schedule_that_is_written(schedule: str) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    state = scheduler_state(catalog(schedule), 0)
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
    rates = []
    for _ in range(5):
        scheduler.step(1)
        rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
    expected = {"constant": 1.0, "wsd": 0.0, "cosine": 0.0, "linear": 0.0}[schedule]
    assert rates[-1] == pytest.approx(expected)
    assert (rates[0] == 1.0) == (schedule in ("constant", "wsd"))


def test_a_schedule_without_counterpart_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.schedule = 'wsdd'.* did you mean 'wsd'"):
        scheduler_state(catalog("wsdd"), 0)


def test_every_schedule_of_ours_but_one_has_a_counterpart() -> None:
    assert LEARNING_RATES.keys() - DECAY_STYLES.keys() == {"inverse-sqrt"}
    assert DECAY_STYLES.keys() <= LEARNING_RATES.keys()
