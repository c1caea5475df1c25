"""The start from a checkpoint that no run has saved, such as a converted one. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import WEIGHT, Manifest
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.optimizer import StateFormat
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig
from holdfast.trainer.models import family_of
from holdfast.trainer.step import state_format


def has_state(manifest: Manifest, form: StateFormat) -> bool:
    """Whether a checkpoint holds optimizer state; one converted from weights alone does not."""
    kinds = {kind.name for kind in form.rule.kinds}
    if not kinds:
        return not is_converted(manifest)
    return any(entry.kind in kinds for entry in manifest.tensors.values())


def is_converted(manifest: Manifest) -> bool:
    """Whether a checkpoint belongs to no run: it was converted, or another program saved it."""
    return not manifest.config


def check_converted(
    manifest: Manifest, config: RunConfig, where: str, *, allow_change: bool
) -> tuple[str, ...]:
    """Check a configuration against a converted checkpoint. Returns notes on the start.

    Args:
        where: the checkpoint's folder or URL; config.json is read where it is a folder.
    Raises:
        ConfigError: the weights have another precision than train.precision, or config.json
            describes another model and `allow_change` is false.
    """
    precision = config.train.precision
    wanted = PRECISIONS[precision].stored
    weights = {name: e for name, e in manifest.tensors.items() if e.kind == WEIGHT}
    for name, entry in weights.items():
        if entry.dtype != wanted:
            raise ConfigError(
                f"{where}: {name} is {entry.dtype}, and train.precision = {precision!r} needs "
                f"{wanted}; convert it with --dtype {precision}, or change train.precision"
            )
    changed = [
        f"model.{key} = {mine!r} (its config.json has {theirs!r})"
        for key, theirs, mine in family_of(config.model.family).differences(
            config.model, _described(where)
        )
    ]
    if changed and not allow_change:
        raise ConfigError(
            f"{where} is of another model: {'; '.join(changed)}; change [model], or go on all "
            "the same with --allow-change"
        )
    notes = [f"differs from the model that was converted: {line}" for line in changed]
    if has_state(manifest, state_format(config)):
        first = (
            f"goes on from {where}, converted: step {manifest.step} with its optimizer's state; "
            "which data it has seen is not known"
        )
    else:
        first = (
            f"starts from the weights of {where}, converted: {len(weights)} tensors {wanted}, "
            "step 0, no moments"
        )
    return (first, *notes)


def _described(where: str) -> dict[str, Any]:
    """The config.json of a folder; empty if it cannot be read."""
    try:
        found = json.loads((Path(where) / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
