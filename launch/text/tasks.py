"""Tasks of lm-evaluation-harness (lm-eval), with a checkpoint's folder as it is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import scheme_of
from holdfast.launch.text.sources import ModelSource
from holdfast.parallel.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """The tasks that are asked for."""

    names: Sequence[str]
    folder: Path | None
    """A folder with tasks of the user's own, beside those of lm-eval."""
    batch: int
    """The requests that are computed at once."""


def task_scores(
    source: ModelSource, request: TaskRequest, device: str
) -> dict[str, dict[str, float]]:
    """The metrics of each task, by name. lm-eval loads the folder by transformers. Local.

    Args:
        device: torch's name of the device.
    Raises:
        ConfigError: lm-eval is not installed, the model is behind a URL, or there is no such task.
    """
    if scheme_of(source.where):
        raise ConfigError(
            f"--tasks with {source.where}: transformers reads folders of this machine; copy it here"
        )
    harness, manager = _harness(request.folder)
    known = set(manager.all_tasks)
    for name in request.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                f"--tasks {name}: lm-eval knows no such task"
                + (
                    f"; did you mean {', '.join(near)}?"
                    if near
                    else "; name its folder by --task-folder"
                )
            )
    found = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": source.where},
        tasks=list(request.names),
        task_manager=manager,
        batch_size=request.batch,
        device=device,
    )
    return {name: _metrics(result) for name, result in found["results"].items()}


def _harness(folder: Path | None) -> tuple[Any, Any]:
    """lm-eval, and its tasks."""
    try:
        import_module("accelerate")  # which lm-eval needs for a folder
        harness, tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-eval, which is not installed here ({error}): pip install "
            "'holdfast[eval]'"
        ) from error
    return harness, tasks.TaskManager(include_path=None if folder is None else str(folder))


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a task's results; a filter that does nothing is not named."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float)
    }
