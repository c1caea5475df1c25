"""The `[optimizer]` section of a configuration, with its tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from holdfast.trainer.config.choices import choice_problem
from holdfast.trainer.learning_rates import DECAY_SHAPES, LEARNING_RATES, Stage


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the TOML file; unknown keys are errors."""


class StageConfig(_Table, frozen=True, omit_defaults=True):
    """A schedule of the learning rate from a step on; see `holdfast.trainer.learning_rates`."""

    start: int
    schedule: str = "constant"
    lr: float | None = None
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    decay_shape: str = "linear"


class OptimizerConfig(_Table, frozen=True):
    """The optimizer and its learning rate. A field for each key."""

    name: str = "adamw"
    """A name of `OPTIMIZERS` (parallel/optimizer)."""
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 10
    schedule: str = "cosine"
    """A name of `LEARNING_RATES`."""
    decay_steps: int = 0
    """The last steps, in which the rate falls to min_lr from what the schedule has at the first of
    them; 0: a fifth of the steps with "wsd", else none."""
    decay_shape: str = "linear"
    """A name of `DECAY_SHAPES`."""
    lr_stages: list[StageConfig] = []
    """Schedules from later steps on: [[optimizer.lr_stages]] tables."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applies to matrices; norm weights do not decay."""
    state: Literal["device", "host"] = "device"
    """The memory in which the state lies, and where it is updated."""
    block_elements: int = 1048576

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages of the learning rate: that of the section itself, and those after it."""
        keys = [key for key in StageConfig.__struct_fields__ if key != "start"]
        own = Stage(0, **{key: getattr(self, key) for key in keys})
        return (own, *(Stage(**msgspec.structs.asdict(stage)) for stage in self.lr_stages))


def stage_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """The broken rules of the learning rate, one line each. Pure."""
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr = {optimizer.min_lr} exceeds optimizer.lr = {optimizer.lr}; lower it"
        )
    last = 0
    for number, stage in enumerate(optimizer.lr_stages):
        name = f"optimizer.lr_stages[{number}]"
        for key, allowed in (("schedule", LEARNING_RATES), ("decay_shape", DECAY_SHAPES)):
            if problem := choice_problem(f"{name}.{key}", getattr(stage, key), allowed):
                yield problem
        if 1 <= stage.start <= last:
            yield (
                f"{name}.start = {stage.start}: must be more than {last}, where the stage before "
                "it starts"
            )
        if stage.lr is not None and stage.min_lr > stage.lr:
            yield f"{name}.min_lr = {stage.min_lr} exceeds its lr = {stage.lr}; lower it"
        last = max(last, stage.start)
