"""metrics.jsonl: a line for each committed step, in order, each step once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.parallel.output import content_of, json_lines, step_of
from holdfast.trainer.reports.offload_metrics import OffloadMetrics


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One committed step; a line of metrics.jsonl, with a field for each key."""

    step: int
    """Counted from 1."""
    loss: float
    loss_hex: str
    grad_norm: float
    grad_norm_hex: str
    lr: float
    tokens: int
    """The tokens trained on since the run began, this step included."""
    step_s: float
    tokens_per_s: float
    world: int
    generation: int
    offload: OffloadMetrics | None = None
    """Given if activations are offloaded; otherwise the line has no such key."""
    skipped: str = ""
    """"spike" if the step was left out as one; otherwise the line has no such key."""
    validation: dict[str, float] = field(default_factory=dict)
    """The losses of validation sets after the step, by name; without any there is no such key."""
    validation_hex: dict[str, str] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    """By layer, the norm of its gradients before clipping, in steps of log.norms_every."""
    param_norms: dict[str, float] = field(default_factory=dict)
    """The same of its parameters before the update."""
    output_rms: dict[str, float | None] = field(default_factory=dict)
    """By layer, in the same steps, the root mean square of its output; None: it is not finite."""
    output_max: dict[str, float | None] = field(default_factory=dict)
    """The largest absolute value of its output."""
    multi_token_loss: float | None = None
    """The loss of what the layer behind the last one predicts; without one there is no such key."""
    multi_token_loss_hex: str = ""
    attention_logit: dict[str, float] = field(default_factory=dict)
    """By layer, the largest logit of attention before the update, with optimizer.qk_clip."""
    expert_load: dict[str, float] = field(default_factory=dict)
    """By layer with experts, the choices of the one with most over the mean."""
    expert_entropy: dict[str, float] = field(default_factory=dict)
    """The entropy of the choices, as a share of that of even ones."""
    experts_unused: dict[str, int] = field(default_factory=dict)
    """The experts without a token."""

    def line(self) -> bytes:
        """The line of the file; numbers that JSON lacks become null."""
        fields: dict[str, Any] = asdict(self)
        for name in _LEFT_OUT:
            if fields[name] in (None, "", {}):
                fields.pop(name)
        return (json.dumps(_finite(fields)) + "\n").encode()


_LEFT_OUT = (
    "offload",
    "skipped",
    "validation",
    "validation_hex",
    "grad_norms",
    "param_norms",
    "output_rms",
    "output_max",
    "multi_token_loss",
    "multi_token_loss_hex",
    "attention_logit",
    "expert_load",
    "expert_entropy",
    "experts_unused",
)
"""The keys that a line has only where there is something to say."""


class ExpertLoad(NamedTuple):
    """How the choices of a step are divided among the experts of a layer."""

    most: float
    """The choices of the expert with most, over the mean."""
    entropy: float
    """The entropy of the choices over that of even ones."""
    unused: int
    """The experts without a choice."""


def load_of(choices: Sequence[int]) -> ExpertLoad:
    """The load of a layer. Pure.

    Args:
        choices: of each expert; not all are 0.
    """
    total, count = sum(choices), len(choices)
    shares = [number / total for number in choices if number]
    entropy = -sum(share * math.log(share) for share in shares)
    even = math.log(count) if count > 1 else 1.0
    return ExpertLoad(max(choices) * count / total, entropy / even, choices.count(0))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_after(path: Path, step: int) -> None:
    """Cut metrics.jsonl after the line of `step`, for a run that repeats the later steps.

    Needs no room on the disk.

    Raises:
        OSError: the file cannot be read or cut.
    """
    content = content_of(path)
    kept = 0
    for line, record in json_lines(content):
        if step_of(record) > step or not line.endswith(b"\n"):
            break
        kept += len(line)
    if kept < len(content):
        os.truncate(path, kept)


def last_step(path: Path) -> int:
    """The last step of metrics.jsonl; 0 without one.

    Raises:
        OSError: the file is there, but cannot be read.
    """
    last = 0
    for _, record in json_lines(content_of(path)):
        last = step_of(record) or last
    return last
