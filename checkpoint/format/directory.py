"""The folder of checkpoints: names, the newest, leftovers, retention, and the steps of a commit.

Local; every function may be called by one process at a time for a folder.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from holdfast.checkpoint.format.files import MANIFEST, Manifest, decode_manifest
from holdfast.parallel.errors import CheckpointError

LATEST = "latest"
PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"step-\d{8,}(\.replaced)?\.partial")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def name_of(step: int) -> str:
    """The folder's name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint folder's name says; None for any other name."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def committed(root: Path) -> list[Path]:
    """All checkpoints of a folder, the oldest first. A folder without a manifest is none."""
    try:
        found = [path for path in root.iterdir() if step_of(path) is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((p for p in found if (p / MANIFEST).is_file()), key=lambda p: step_of(p) or 0)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = checkpoint / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "has no manifest.json, so it is not a committed checkpoint"
        raise CheckpointError(
            f"{checkpoint} {what if checkpoint.is_dir() else 'is not a checkpoint folder'}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return decode_manifest(content, str(path))


def newest(root: Path) -> Path | None:
    """The newest checkpoint that has a readable manifest; None if there is none."""
    for path in reversed(committed(root)):
        try:
            read_manifest(path)
        except CheckpointError:
            continue
        return path
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, what `latest` says, or the newest of a run.

    Raises:
        CheckpointError: there is none.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent / path.read_text().strip()
    if (path / MANIFEST).is_file():
        return path
    for root in (path, path / "checkpoints"):
        found = newest(root)
        if found is not None:
            return found
    raise CheckpointError(
        f"{path} is not a checkpoint, and there is none in it; name a folder with a manifest.json, a "
        "checkpoints folder or a run"
    )


def begin(root: Path, step: int) -> Path:
    """Make the folder that a save writes to; what earlier saves left unfinished is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in leftovers(root):
        shutil.rmtree(leftover)
    partial = root / (name_of(step) + PARTIAL)
    partial.mkdir()
    return partial


def leftovers(root: Path) -> Iterator[Path]:
    """Folders of saves, or of removals, that did not finish."""
    for path in root.iterdir():
        unfinished = _UNFINISHED.fullmatch(path.name) is not None
        if unfinished or (step_of(path) is not None and not (path / MANIFEST).is_file()):
            yield path


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(partial: Path, manifest: bytes) -> Path:
    """Make a written folder a checkpoint: manifest last, then one rename; and point `latest` to it.

    A crash at any instant leaves either the old state or the new one.
    """
    write_synced(partial / MANIFEST, manifest)
    sync(partial)
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    root = partial.parent
    if not final.exists():
        partial.rename(final)
    elif _exchange(partial, final):
        sync(root)
        shutil.rmtree(partial)
    else:
        replaced = final.with_name(f"{final.name}.replaced{PARTIAL}")
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    sync(root)
    point_latest(root, final.name)
    return final


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the filesystem cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def point_latest(root: Path, name: str) -> None:
    """Make `latest` name a committed checkpoint, by one rename."""
    fresh = root / f".{LATEST}{PARTIAL}"
    write_synced(fresh, f"{name}\n".encode())
    fresh.replace(root / LATEST)
    sync(root)


def retain(root: Path, keep: int, protected: Iterable[Path] = ()) -> list[Path]:
    """Remove all but the newest `keep` checkpoints (0: keep all); returns what was removed.

    The manifest goes first, so that a folder half removed is not taken for a checkpoint.
    """
    if keep < 1:
        return []
    spared = set(protected)
    removed = [path for path in committed(root)[:-keep] if path not in spared]
    for path in removed:
        (path / MANIFEST).unlink()
        shutil.rmtree(path)
    return removed


def free_bytes(root: Path) -> int:
    """What an ordinary user may still write to the filesystem of `root`, or of where it will be."""
    place = root
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize
