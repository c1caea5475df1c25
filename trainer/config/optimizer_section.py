"""The `[optimizer]` section of a configuration, with its tables. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from holdfast.parallel.optimizer import OPTIMIZERS, ParameterGroups, matched_by_none
from holdfast.trainer.config.choices import choice_problem
from holdfast.trainer.learning_rates import DECAY_SHAPES, LEARNING_RATES, Stage

_MOST_BETA = 0.99
"""bf16 has 8 bits: what a moment loses in a step must be more than 2^-8 of it."""


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


class GroupConfig(_Table, frozen=True, omit_defaults=True):
    """The parameters of some names, with what they get instead of what the section says."""

    match: list[str] | str
    """Their logical names, or patterns of them."""
    lr: float | None = None
    """In place of the section's; the schedule is the same."""
    weight_decay: float | None = None
    """Applies to all parameters of the group, those that are no matrices included."""
    betas: tuple[float, float] | None = None
    eps: float | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of names, one or more."""
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of the optimizer that the group has of its own, by name."""
        values = {key: getattr(self, key) for key in ("weight_decay", "betas", "eps")}
        return {key: value for key, value in values.items() if value is not None}

    def within(self, section: OptimizerConfig) -> OptimizerConfig:
        """The section as the group has it, its learning rate aside."""
        return msgspec.structs.replace(section, **self.constants)


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
    groups: list[GroupConfig] = []
    """Parameters with constants of their own, the first that matches: [[optimizer.groups]]
    tables."""
    state: Literal["device", "host"] = "device"
    """The memory in which the state lies, and where it is updated."""
    moments_dtype: Literal["auto", "bf16"] = "auto"
    """The type of what is kept beside master values; "auto": theirs. "bf16" is rounded to the
    nearest after each update."""
    ema: float = 0.0
    """The share of the moving average of the weights that stays in an update; 0: there is none."""
    qk_clip: float = 0.0
    """The limit of a head's logits, beyond which its queries and keys are scaled down after a step;
    0: there is none."""
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


def moment_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """The broken rules of moments with few bits, one line each. Pure."""
    if optimizer.moments_dtype == "auto" or "betas" not in OPTIMIZERS[optimizer.name].constants:
        return
    found = {"optimizer.betas": optimizer.betas}
    found |= {f"optimizer.groups[{n}].betas": g.betas for n, g in enumerate(optimizer.groups)}
    for name, betas in found.items():
        if betas is not None and max(betas) > _MOST_BETA:
            yield (
                f"{name} = {list(betas)} with optimizer.moments_dtype = "
                f"{optimizer.moments_dtype!r}: a moment that falls by less than half of its last "
                f"bit never falls; use at most {_MOST_BETA}, or leave moments_dtype out"
            )


def average_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """The broken rules of the average of the weights. Pure."""
    if optimizer.ema == 1:
        yield "optimizer.ema = 1: the average would never change; use less than 1, such as 0.999"


def group_problems(optimizer: OptimizerConfig, names: Sequence[str]) -> Iterator[str]:
    """The broken rules of groups of parameters, one line each. Pure.

    Args:
        names: the logical names of the model's parameters.
    """
    rule = OPTIMIZERS[optimizer.name]
    taken = {ParameterGroups.of(rule, optimizer).number(name) for name in names}
    for number, group in enumerate(optimizer.groups):
        where = f"optimizer.groups[{number}]"
        for key in group.constants.keys() - set(rule.constants):
            yield f"{where}.{key}: {optimizer.name!r} does not use it; leave it out"
        if not group.patterns:
            yield f"{where}.match = []: name parameters, or leave the group out"
        lost = matched_by_none(group.patterns, names)
        for pattern in lost:
            near = _near(pattern, names)
            yield f"{where}.match = {pattern!r}: no parameter has such a name{near}"
        if not lost and number not in taken:
            yield (
                f"{where}.match = {group.match!r}: groups before it have all of these parameters; "
                "put it before them"
            )


def _near(pattern: str, names: Sequence[str]) -> str:
    """The end of the message on a pattern: the name that has most of it, the first of equal layers.

    Pure.
    """
    first = {re.sub(r"\d+", "0", name): name for name in reversed(names)}
    plain = re.sub(r"\d+", "0", pattern.replace("*", ""))[:200]

    def likeness(name: str) -> tuple[float, float]:
        matched = difflib.SequenceMatcher(None, plain, name, autojunk=False).get_matching_blocks()
        return sum(block.size**2 for block in matched), -len(name)

    return f"; did you mean {first[max(first, key=likeness)]!r}?"
