"""Runs that are opened and ended at once, and checkpoints as a run leaves them. Local."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from holdfast.checkpoint import save
from holdfast.checkpoint.format.files import encode_manifest
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.trainer.config import RunConfig
from holdfast.trainer.run import RunRequest, opened_run


def open_and_end(request: RunRequest, *, resume: str = "auto") -> tuple[str, ...]:
    """Open a run and end it at once. Returns the notes for a person."""
    with opened_run(replace(request, resume=resume)) as opened:
        return opened.directory.resume.notes


def save_as_run(folder: Path, config: RunConfig, *steps: int) -> None:
    """Save checkpoints as a run of this configuration does."""
    for step in steps:
        place = save(folder, {"a": torch.full((9,), float(step))}, step=step)
        manifest = LocalStore(folder).manifest(place.name)
        kept = msgspec.structs.replace(manifest, config=msgspec.to_builtins(config))
        (place / "manifest.json").write_bytes(encode_manifest(kept))
