"""The writing of small files beside the tensors of an output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from holdfast.checkpoint.stores import sync, write_synced


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files by their paths in a folder; they are on the disk when this returns."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        write_synced(path, content)
        if path.parent != folder:
            sync(path.parent)
