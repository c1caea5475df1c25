"""A checkpoint store in a local or shared file system: files are synced, a rename commits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.format import (
    LATEST,
    MANIFEST,
    OWNER,
    PARTIAL,
    Manifest,
    decode_manifest,
    step_of,
)
from holdfast.checkpoint.loading import FolderReader
from holdfast.checkpoint.stores.durable import free_bytes, set_aside, sync, write_synced
from holdfast.parallel.errors import CheckpointError

_UNFINISHED = re.compile(r"step-\d{8,}(\.replaced)?\.partial")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class LocalStore:
    """Checkpoints in subfolders of `root`. A new one is first written to `step-N.partial`."""

    root: Path

    def path(self, name: str) -> Path:
        """The folder of a checkpoint."""
        return self.root / name

    def partial(self, name: str) -> Path:
        """The folder that holds the files of a checkpoint until the commit."""
        return self.root / f"{name}{PARTIAL}"

    def place_of(self, name: str) -> str:
        return str(self.path(name))

    def names(self) -> list[str]:
        return [name for name in self.folders() if self.has(name)]

    def folders(self) -> list[str]:
        """The entries with a checkpoint's name, oldest first, with or without a manifest."""
        try:
            found = [path.name for path in self.root.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        steps = [(step, name) for name in found if (step := step_of(name)) is not None]
        return [name for _, name in sorted(steps)]

    def paths(self) -> list[Path]:
        """The folders of the committed checkpoints, oldest first."""
        return [self.path(name) for name in self.names()]

    def has(self, name: str) -> bool:
        return (self.path(name) / MANIFEST).is_file()

    def latest(self) -> str:
        path = self.root / LATEST
        return path.read_text().strip() if path.is_file() else ""

    def manifest(self, name: str) -> Manifest:
        folder = self.path(name)
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            what = "has no manifest.json, so it is not a committed checkpoint"
            raise CheckpointError(
                f"{folder} {what if folder.is_dir() else 'is not a checkpoint folder'}"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        return decode_manifest(content, str(path))

    def files(self, name: str) -> dict[str, int]:
        try:
            return {p.name: p.stat().st_size for p in self.path(name).iterdir() if p.is_file()}
        except OSError as error:
            raise CheckpointError(f"{self.path(name)} cannot be read: {error.strerror}") from error

    def reader(self, name: str) -> FolderReader:
        return FolderReader(self.path(name))

    def begin(self, name: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self._leftovers():
            remove_entry(leftover)
        self.partial(name).mkdir()

    def put(self, source: Path, name: str, file: str) -> None:
        target = self.partial(name) / file
        shutil.copyfile(source, target)
        sync(target)

    def write(self, name: str, file: str, content: bytes) -> None:
        write_synced(self.partial(name) / file, content)

    def discard(self, name: str) -> None:
        """Remove the files of a checkpoint that will not be committed."""
        with contextlib.suppress(OSError):
            remove_entry(self.partial(name))

    def publish(self, name: str, manifest: bytes) -> None:
        partial, final = self.partial(name), self.path(name)
        write_synced(partial / MANIFEST, manifest)
        sync(partial)
        if os.path.lexists(final) and not self.has(name):
            self.set_aside(name)
        if not os.path.lexists(final):
            partial.rename(final)
        elif _exchange(partial, final):
            sync(self.root)
            remove_entry(partial)
        else:
            replaced = self._removed(name)
            final.rename(replaced)
            partial.rename(final)
            remove_entry(replaced)
        sync(self.root)

    def point_latest(self, name: str) -> None:
        self._replace(LATEST, f"{name}\n".encode())

    def owner(self) -> bytes:
        path = self.root / OWNER
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def set_owner(self, content: bytes) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._replace(OWNER, content)

    def retain(self, keep: int, protected: Collection[str] = ()) -> list[str]:
        if keep < 1:
            return []
        removed = [name for name in self.names()[:-keep] if name not in protected]
        for name in removed:
            self.path(name).rename(self._removed(name))
            remove_entry(self._removed(name))
        return removed

    def set_aside(self, name: str) -> Path:
        """Rename a folder with a checkpoint's name, whose files stay. Returns the new name."""
        return set_aside(self.path(name))

    def free_bytes(self) -> int:
        """The bytes an ordinary user may still write here."""
        return free_bytes(self.root)

    def _replace(self, file: str, content: bytes) -> None:
        fresh = self.root / f".{file}{PARTIAL}"
        write_synced(fresh, content)
        fresh.replace(self.root / file)
        sync(self.root)

    def _removed(self, name: str) -> Path:
        """The name of a checkpoint's folder while it is removed."""
        return self.root / f"{name}.replaced{PARTIAL}"

    def _leftovers(self) -> Iterator[Path]:
        """The folders of saves or removals that did not finish."""
        return (path for path in self.root.iterdir() if _UNFINISHED.fullmatch(path.name))


def remove_entry(path: Path) -> None:
    """Remove a folder with its content. Of a link, only the link: its target is not ours."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the filesystem cannot do that."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
