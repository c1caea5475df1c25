"""Where a model is read from: a checkpoint of ours, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from holdfast.checkpoint.format import WEIGHT, Manifest, scheme_of
from holdfast.checkpoint.loading import LoadRequest, Targets, boxes_of, load
from holdfast.checkpoint.model_config import read_config
from holdfast.checkpoint.stores import StoredCheckpoint, find_checkpoint
from holdfast.parallel.errors import CheckpointError, ConfigError, Unreadable
from holdfast.trainer.config import RunConfig, convert_config

_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
TRIES = 4
"""How often a newer checkpoint is taken for one that its run has removed."""


class ModelSource(Protocol):
    """The weights and the description of a model. Local."""

    @property
    def where(self) -> str:
        """Its path or URL."""
        ...

    @property
    def step(self) -> int | None:
        """The steps of the run that it is of; None: it is of no run."""
        ...

    @property
    def run(self) -> RunConfig | None:
        """The configuration of the run that saved it; None: none did."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """The small files that describe model and tokenizer, by name."""
        ...

    @property
    def weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The type (by safetensors' name) and the shape of each weight."""
        ...

    def fill(self, targets: Targets) -> None:
        """Read weights to where they belong. Raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True)
class SavedModel:
    """The model in a checkpoint of ours. Every byte that is read is checked."""

    found: StoredCheckpoint
    manifest: Manifest
    files: Mapping[str, bytes] = field(repr=False)
    run: RunConfig | None

    @property
    def where(self) -> str:
        return self.found.place

    @property
    def step(self) -> int | None:
        return self.manifest.step if self.run is not None else None

    @property
    def weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        entries = self.manifest.tensors.items()
        return {name: (e.dtype, tuple(e.shape)) for name, e in entries if e.kind == WEIGHT}

    def fill(self, targets: Targets) -> None:
        reader = self.found.reader()
        try:
            wanted = {0: boxes_of(targets)}
            load(LoadRequest(self.manifest, reader, targets, wanted, 0, self.where))
        finally:
            reader.close()


def find_model(place: str) -> ModelSource:
    """The model at a path or URL: a checkpoint, the newest of a run, or a Hugging Face folder.

    Raises:
        ConfigError: there is none.
        CheckpointError: it cannot be read, or its run removes checkpoints faster than that.
    """
    for left in reversed(range(TRIES)):
        try:
            found = find_checkpoint(place)
        except Unreadable as error:
            return _published(place, error)
        try:
            return saved_model(found)
        except CheckpointError as error:
            if found.store.has(found.name):
                raise
            if not left:
                raise removed(found.place) from error
    raise AssertionError


def _published(place: str, error: Unreadable) -> ModelSource:
    """The model in a folder that is no checkpoint."""
    folder = Path(place)
    if scheme_of(place) or not (folder / "config.json").is_file():
        raise ConfigError(
            f"{place} is neither a checkpoint, nor a run with one, nor a Hugging Face folder with "
            f"a config.json ({error})"
        ) from error
    from holdfast.launch.text.published import published_model

    return published_model(folder)


def removed(where: str) -> CheckpointError:
    """The error of a checkpoint that is gone."""
    return CheckpointError(
        f"{where} was removed while it was read: a run that goes on keeps its newest checkpoints "
        "(checkpoint.keep); name the run to read its newest one"
    )


def saved_model(found: StoredCheckpoint) -> SavedModel:
    """The model in a checkpoint, with its description read.

    Raises:
        CheckpointError: it is damaged, or is gone.
    """
    manifest = found.manifest()
    reader = found.reader()
    try:
        files = {name: reader.read_file(name) for name in _BESIDE if name in manifest.files}
    finally:
        reader.close()
    run = convert_config(manifest.config) if manifest.config else None
    return SavedModel(found, manifest, files, run)


def is_gone(source: ModelSource) -> bool:
    """Whether a checkpoint is no longer there: its run has removed it for a newer one."""
    return isinstance(source, SavedModel) and not source.found.store.has(source.found.name)


def described_model(source: ModelSource) -> dict[str, Any]:
    """The keys of the config.json.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if "config.json" not in source.files:
        raise ConfigError(f"{source.where} has no config.json, so what it computes is not known")
    try:
        return read_config(source.files["config.json"])
    except ValueError as error:
        raise ConfigError(f"{source.where}: config.json cannot be read: {error}") from error
