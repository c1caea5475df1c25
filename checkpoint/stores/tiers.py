"""From one tier to the next by plain copying: what a parent process does with its dead workers' memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from holdfast.checkpoint.format import MANIFEST, directory
from holdfast.checkpoint.tools import verify_checkpoint
from holdfast.parallel.errors import CheckpointError


def flush(memory: Path, disk: Path) -> Path | None:
    """Copy the newest checkpoint in `memory` to `disk` if that has none as new. Local.

    Returns:
        Where it is now; None if there was nothing to copy.
    Raises:
        CheckpointError: the copy in memory is damaged, or the disk has no room for it.
        OSError: the disk.
    """
    source = directory.newest(memory)
    if source is None:
        return None
    manifest = directory.read_manifest(source)
    kept = directory.newest(disk)
    if kept is not None and (directory.step_of(kept) or 0) >= manifest.step:
        return None
    problems = verify_checkpoint(source)
    if problems:
        raise CheckpointError(f"{source}: {problems[0]}")
    free = directory.free_bytes(disk)
    if free < manifest.bytes:
        raise CheckpointError(f"{disk} has {free} bytes free, and {manifest.bytes} are needed")
    partial = directory.begin(disk, manifest.step)
    for name in manifest.files:
        shutil.copyfile(source / name, partial / name)
        descriptor = os.open(partial / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return directory.commit(partial, (source / MANIFEST).read_bytes())
