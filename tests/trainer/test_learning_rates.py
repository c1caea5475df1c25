"""Learning rates are those of torch and transformers; a schedule is a function and a line of the
registry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from torch.distributed import HashStore
from torch.optim import lr_scheduler

from holdfast.parallel.errors import ConfigError
from holdfast.trainer import learning_rates
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.loading import dump_toml, load_config
from holdfast.trainer.learning_rates import DECAY_SHAPES, LEARNING_RATES, Stage, learning_rate
from holdfast.trainer.loop import train
from holdfast.trainer.run.run_directory import RunDirectory
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
        assert [config.rate_of(step) for step in range(7)] == [0.5, 1, 1, 0.5, 0.25, 0.125, 0.1]


def rates(steps: int, *stages: Stage) -> list[float]:
    return [learning_rate(step, steps=steps, stages=stages) for step in range(steps)]


def of_torch(count: int, schedule: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    """The first rates of a schedule of torch or transformers whose highest rate is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    found, scheduler = [], schedule(optimizer)
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_rise_and_fall_as_those_of_torch() -> None:
    # torch counts the steps of a warm-up from 0, so that its first step has no rate.
    steps, warmup, least = 60, 12, 0.1
    after = rates(steps, Stage(schedule="cosine", lr=1.0, min_lr=least, warmup_steps=warmup))
    cosine = of_torch(
        steps - warmup,
        lambda o: lr_scheduler.CosineAnnealingLR(o, steps - 1 - warmup, eta_min=least),
    )
    assert after[warmup:] == pytest.approx(cosine, rel=1e-9)
    line = rates(steps, Stage(schedule="linear", lr=1.0, min_lr=least, warmup_steps=warmup))
    linear = of_torch(
        steps - warmup, lambda o: lr_scheduler.LinearLR(o, 1.0, least, steps - 1 - warmup)
    )
    assert line[warmup:] == pytest.approx(linear, rel=1e-9)
    warming = of_torch(
        warmup, lambda o: lr_scheduler.LinearLR(o, 1 / warmup, total_iters=warmup - 1)
    )
    assert line[:warmup] == after[:warmup] == pytest.approx(warming, rel=1e-9)


@pytest.mark.parametrize("warmup", [0, 12])
def test_the_inverse_square_root_is_that_of_transformers(warmup: int) -> None:
    found = rates(50, Stage(schedule="inverse-sqrt", lr=1.0, warmup_steps=warmup))
    peer = of_torch(51, lambda o: transformers.get_inverse_sqrt_schedule(o, warmup))
    assert found == pytest.approx(peer[1:], rel=1e-9)
    assert min(rates(50, Stage(schedule="inverse-sqrt", lr=1.0, min_lr=0.9))) >= 0.9


@pytest.mark.parametrize("shape", [*DECAY_SHAPES])
def test_decays_are_those_of_transformers(shape: str) -> None:
    warmup, stable, decay = 5, 20, 8
    found = rates(
        warmup + stable + decay,
        Stage(
            schedule="wsd",
            lr=1.0,
            min_lr=0.25,
            warmup_steps=warmup,
            decay_steps=decay,
            decay_shape=shape,
        ),
    )
    # Theirs reaches its end a step after the last one.
    peer = of_torch(
        warmup + stable + decay,
        lambda o: transformers.get_wsd_schedule(
            o,
            num_warmup_steps=warmup,
            num_stable_steps=stable,
            num_decay_steps=decay - 1,
            decay_type=shape,
            min_lr_ratio=0.25,
        ),
    )
    assert found[warmup:] == pytest.approx(peer[warmup:], rel=1e-9)


stages = st.builds(
    Stage,
    schedule=st.sampled_from([*LEARNING_RATES]),
    lr=st.floats(0.5, 1.0),
    min_lr=st.floats(0.0, 0.5),
    warmup_steps=st.integers(0, 30),
    decay_steps=st.integers(0, 80),
    decay_shape=st.sampled_from([*DECAY_SHAPES]),
)


@given(stages, st.integers(1, 60))
def test_a_rate_rises_to_its_highest_and_then_never_rises(stage: Stage, steps: int) -> None:
    found, highest = rates(steps, stage), (stage.lr or 0) + 1e-12
    assert all(0 < rate <= highest for rate in found[: stage.warmup_steps])
    after = found[stage.warmup_steps :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(stage.min_lr - 1e-12 <= rate <= highest for rate in after)
    if len(after) > 1 and (stage.schedule in ("cosine", "linear", "wsd") or stage.decay_steps > 1):
        decays = stage.first_decay(steps) < steps - 1
        assert after[-1] == pytest.approx(stage.min_lr) or not decays


@given(st.lists(st.tuples(stages, st.integers(1, 40)), min_size=1, max_size=4))
def test_a_stage_is_a_run_of_its_own(parts: list[tuple[Stage, int]]) -> None:
    made, start = [], 0
    for stage, length in parts:
        made.append(replace(stage, start=start, warmup_steps=0))
        start += length
    alone = [rates(length, replace(stage, warmup_steps=0)) for stage, length in parts]
    assert rates(start, *made) == [rate for found in alone for rate in found]


def test_a_stage_begins_at_the_rate_before_it_and_warms_up_from_there() -> None:
    first = Stage(lr=1.0, schedule="linear", min_lr=0.5)
    stay, again = Stage(start=10), Stage(start=20, lr=2.0, warmup_steps=3)
    found = rates(30, first, stay, again)
    assert found[9:20] == [0.5] * 11
    assert found[20:24] == pytest.approx([1.0, 1.5, 2.0, 2.0])
    assert rates(15, first, stay, again) == found[:15], (
        "a stage that is not reached changes nothing"
    )


def test_a_constant_run_decays_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(TABLE.replace("halving", "constant"))
    long = load_config(path, ["train.steps=100"])
    decayed = load_config(path, ["train.steps=60", "optimizer.decay_steps=20"])
    assert [decayed.rate_of(s) for s in range(41)] == [long.rate_of(s) for s in range(41)]
    falling = [decayed.rate_of(step) for step in range(40, 60)]
    assert falling == pytest.approx([1.0 - 0.9 * k / 19 for k in range(20)])


def test_stages_are_tables_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        TABLE.replace("halving", "constant")
        + "[[optimizer.lr_stages]]\nstart = 50\nschedule = 'cosine'\nmin_lr = 0.2\n"
        + "[[optimizer.lr_stages]]\nstart = 80\nlr = 0.05\n"
    )
    config = load_config(path)
    assert [config.rate_of(step) for step in (49, 50, 79, 80, 99)] == pytest.approx(
        [1.0, 1.0, 0.2, 0.05, 0.05]
    )
    assert config.rate_of(64) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 14 / 29)))
    written = tmp_path / "resolved.toml"
    written.write_text(dump_toml(config))
    assert load_config(written) == config


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("{start = 5, shedule = 'cosine'}", "did you mean optimizer.lr_stages[0].schedule?"),
        (
            "{start = 5, schedule = 'cosin'}",
            "optimizer.lr_stages[0].schedule = 'cosin': allowed",
        ),
        ("{start = 0}", "optimizer.lr_stages[0].start = 0: must be 1 or more"),
        ("{start = 5}, {start = 5}", "optimizer.lr_stages[1].start = 5: must be more than 5"),
        (
            "{start = 5, lr = 0.1, min_lr = 0.2}",
            "lr_stages[0].min_lr = 0.2 exceeds its lr",
        ),
        ("{start = 5, lr = 0}", "optimizer.lr_stages[0].lr = 0.0: must be greater than 0"),
        ("{lr = 1}", "start"),
        ("{start = 5, lr = 'x'}", "optimizer.lr_stages"),
    ],
)
def test_a_wrong_stage_says_what_to_change(tmp_path: Path, stage: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(TABLE.replace("halving", "constant"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"optimizer.lr_stages=[{stage}]"])
    assert said in str(caught.value)


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
