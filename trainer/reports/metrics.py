"""metrics.jsonl: a line for each committed step, in order, each step once."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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

    def line(self) -> bytes:
        """The line of the file; numbers that JSON lacks become null."""
        fields: dict[str, Any] = asdict(self)
        for name in _LEFT_OUT:
            if not fields[name]:
                fields.pop(name)
        return (json.dumps(_finite(fields)) + "\n").encode()


_LEFT_OUT = ("offload", "skipped", "validation", "validation_hex", "grad_norms", "param_norms")
"""The keys that a line has only where there is something to say."""


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
