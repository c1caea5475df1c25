"""The start from weights that no run has saved: a converted checkpoint, or a Hugging Face folder.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import MANIFEST, WEIGHT, Manifest, expanded, scheme_of
from holdfast.checkpoint.model_config import read_config
from holdfast.checkpoint.stores import find_checkpoint
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.optimizer import AVERAGE, StateFormat
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.reading import read_regular
from holdfast.trainer.config import RunConfig, advice_to_allow, refused_changes
from holdfast.trainer.models import (
    family_of,
    further_losses_of,
    layer_specs,
    serves_training_alone,
)
from holdfast.trainer.step import state_format

FIRST_WEIGHTS = "from-hf"
"""The folder of a run with the weights of `model.from_hf`, as a checkpoint of step 0."""


def first_weights(root: Path, config: RunConfig) -> Path | None:
    """The converted weights of `model.from_hf` in a run's folder; None: there are none."""
    place = root / FIRST_WEIGHTS
    return place if config.model.from_hf and (place / MANIFEST).is_file() else None


def take_first_weights(
    root: Path,
    config: RunConfig,
    say: Callable[[str], None],
    *,
    allow_change: Sequence[str] = (),
) -> None:
    """Convert the weights of `model.from_hf` into a run's folder, unless they are there.

    One process calls it, with the lock of the folder. What a killed one has begun is gone on with.

    Raises:
        ConfigError: its config.json describes another model in a key that `allow_change` does not
            name.
        CheckpointError: the folder is damaged, or the disk has no room.
    """
    if not config.model.from_hf or first_weights(root, config) is not None:
        return
    from holdfast.checkpoint.convert import Conversion, convert

    source = expanded(config.model.from_hf, "model.from_hf")
    _check_described(_content(source), config, str(source), allow_change=allow_change)
    converted = convert(
        Conversion(
            source=source,
            target=(root / FIRST_WEIGHTS).absolute(),
            to="holdfast",
            dtype=PRECISIONS[config.train.precision].stored,
        )
    )
    assert converted is not None
    say(f"took the weights of {source}: {converted.bytes / 2**20:,.1f} MiB")


def has_state(manifest: Manifest, form: StateFormat) -> bool:
    """Whether a checkpoint holds optimizer state; one converted from weights alone does not.

    Nor does one of another optimizer, with moments of another precision, or without an average.
    """
    saved = manifest.config.get("optimizer", {}).get("name", form.rule.name)
    if saved != form.rule.name:
        return False
    kinds = {kind.name for kind in form.rule.kinds}
    if not kinds:
        return not is_converted(manifest)
    if lacks_average(manifest, form):
        return False
    return any(
        entry.kind in kinds and entry.dtype == form.precision_of(entry.kind).stored
        for entry in manifest.tensors.values()
    )


def lacks_average(manifest: Manifest, form: StateFormat) -> bool:
    """Whether a run keeps an average of the weights, and a checkpoint has none."""
    wanted = AVERAGE in (kind.name for kind in form.rule.kinds)
    return wanted and all(entry.kind != AVERAGE for entry in manifest.tensors.values())


def is_converted(manifest: Manifest) -> bool:
    """Whether a checkpoint belongs to no run: it was converted, or another program saved it."""
    return not manifest.config


def check_converted(
    manifest: Manifest, config: RunConfig, where: str, *, allow_change: Sequence[str]
) -> tuple[str, ...]:
    """Check a configuration against a converted checkpoint. Returns notes on the start.

    Args:
        where: the checkpoint's folder or URL; config.json is read where it is a folder.
    Raises:
        ConfigError: the weights have another precision than train.precision, are not those of
            the model, or config.json describes another model in a key that `allow_change` does not
            name.
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
    described = _described(manifest, where)
    changed = _check_described(described, config, where, allow_change=allow_change)
    check_tensors(manifest, config, where)
    notes = [f"differs from the model that was converted: {line}" for line in changed.values()]
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


def _check_described(
    described: dict[str, Any] | None,
    config: RunConfig,
    where: str,
    *,
    allow_change: Sequence[str],
) -> dict[str, str]:
    """The differences between the model and a config.json, which are all allowed.

    Raises:
        ConfigError: there are others.
    """
    changed: dict[str, str] = {}
    if described is not None:
        changed = dict(family_of(config.model.family).differences(config.model, described))
    if refused := refused_changes(changed, allow_change):
        told = "; ".join(changed[key] for key in refused)
        advice = advice_to_allow(changed, allow_change)
        raise ConfigError(f"{where}: {told}; change [model], or {advice}")
    return changed


def check_tensors(manifest: Manifest, config: RunConfig, where: str) -> None:
    """Check that a checkpoint's weights are those of the model, by name and shape.

    Raises:
        ConfigError: a weight is missing, has another shape, or has no place in the model.
    """
    layers = layer_specs(
        config.model,
        tensor=1,
        sequence_parallel=False,
        seq_len=1,
        micro_batch=1,
        precision=config.train.precision,
        recompute="none",
    )
    wanted = {row.name: tuple(row.shape) for layer in layers for row in layer.parameters[0]}
    found = {n: tuple(e.shape) for n, e in manifest.tensors.items() if e.kind == WEIGHT}
    problems = [
        (name, f"has shape {list(found[name])}, and the model's has {list(shape)}")
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems += [(name, "is missing, and the model has it") for name in wanted if name not in found]
    # Published models may have a layer that the run does not train.
    trains_all = further_losses_of(config.model) > 0
    problems += [
        (name, "is of no use to the model")
        for name in found
        if name not in wanted and (trains_all or not serves_training_alone(config.model, name))
    ]
    if problems:
        shown = "; ".join(f"{name} {what}" for name, what in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"{where} does not hold the weights of [model]: {shown}{more}; change [model] to what "
            "the checkpoint has (--allow-change is for settings, not for weights)"
        )


def _described(manifest: Manifest, where: str) -> dict[str, Any] | None:
    """The keys of the config.json in a checkpoint; None if it has no such file.

    Raises:
        ConfigError: the file cannot be read, or is not a JSON object.
    """
    try:
        if not scheme_of(where):
            return _content(Path(where))
        if "config.json" not in manifest.files:
            return None
        reader = find_checkpoint(where).reader()
        try:
            return read_config(reader.read_file("config.json"))
        finally:
            reader.close()
    except (OSError, ValueError, CheckpointError) as error:
        raise ConfigError(f"{where}: config.json cannot be read: {error}") from error


def _content(folder: Path) -> dict[str, Any] | None:
    """The keys of the config.json in a folder; None: there is none.

    Raises:
        ConfigError: the file cannot be read, or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        return read_config(read_regular(path)) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: config.json cannot be read: {error}") from error
