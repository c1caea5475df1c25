"""The flush of the memory tier to disk by plain copying, in the parent process of dead workers."""

from __future__ import annotations

import uuid
from pathlib import Path

from holdfast.checkpoint.format import MANIFEST, attempt_of, step_of
from holdfast.checkpoint.stores import LocalStore, commit, newest
from holdfast.checkpoint.tools import verify_checkpoint
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import read_regular


def flush(memory: Path, disk: Path) -> Path | None:
    """Copy the newest checkpoint in `memory` to `disk`, if it is newer than those there. Local.

    Returns:
        The new folder; None if there was nothing to copy.
    Raises:
        CheckpointError: the copy in memory is damaged, or the disk lacks room for it.
        OSError: the disk failed.
    """
    source, target = LocalStore(memory), LocalStore(disk, attempt_of(0, 0, uuid.uuid4().hex))
    name = newest(source)
    if name is None:
        return None
    manifest = source.manifest(name)
    kept = newest(target)
    if kept is not None and (step_of(kept) or 0) >= manifest.step:
        return None
    problems = verify_checkpoint(source.path(name))
    if problems:
        raise CheckpointError(f"{source.path(name)}: {problems[0]}")
    free = target.free_bytes()
    if free < manifest.bytes:
        raise CheckpointError(f"{disk} has {free} bytes free, and {manifest.bytes} are needed")
    target.begin(name)
    try:
        with target.written(name):
            for file in manifest.files:
                target.put(source.path(name) / file, name, file)
            commit(target, name, read_regular(source.path(name) / MANIFEST))
    finally:
        target.discard(name)
    return target.path(name)
