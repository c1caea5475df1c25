"""A checkpoint store in a local or shared file system: files are synced, a rename commits."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.format import (
    BEST,
    LATEST,
    MANIFEST,
    MANIFEST_END_BYTES,
    OWNER,
    PARTIAL,
    Manifest,
    decode_manifest,
    ends_manifest,
    step_of,
    unfinished_generation,
)
from holdfast.checkpoint.loading import FolderReader
from holdfast.checkpoint.stores.durable import free_bytes, set_aside, sync, write_synced
from holdfast.checkpoint.stores.protocol import superfluous
from holdfast.parallel.errors import CheckpointError, Unreadable
from holdfast.parallel.files import open_added, try_lock
from holdfast.parallel.reading import open_descriptor, open_regular, read_regular, read_whole

_FRESH = (f".{LATEST}.", f".{BEST}.")
"""The beginnings of the names of `latest` and `best` until they are whole."""
_MOST_LATEST_BYTES, _MOST_OWNER_BYTES = 4096, 1 << 16


@dataclass(frozen=True, slots=True)
class LocalStore:
    """Checkpoints in subfolders of `root`. A new one is first written to `step-N.ATTEMPT.partial`.

    Attempts to save never share a folder, so a save that was given up touches no other's files.
    """

    root: Path
    attempt: str = ""
    """The name of the attempt that writes; see `holdfast.checkpoint.format.attempt_of`."""
    generation: int = 0
    """The generation that the attempt belongs to; attempts of earlier ones were given up."""

    def path(self, name: str) -> Path:
        """The folder of a checkpoint."""
        return self.root / name

    def partial(self, name: str) -> Path:
        """The folder that holds the files of a checkpoint until the commit."""
        attempt = f".{self.attempt}" if self.attempt else ""
        return self.root / f"{name}{attempt}{PARTIAL}"

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
        return self._pointed(LATEST, "the newest checkpoint")

    def best(self) -> str:
        return self._pointed(BEST, "the best checkpoint")

    def _pointed(self, file: str, what: str) -> str:
        path = self.root / file
        try:
            return read_regular(path, _MOST_LATEST_BYTES).decode(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            cure = "make it readable" if error.errno == errno.EACCES else "it may be removed"
            raise Unreadable(
                f"{path} cannot be read: {error.strerror}; it names {what}; {cure}"
            ) from error

    def manifest(self, name: str) -> Manifest:
        folder = self.path(name)
        path = folder / MANIFEST
        try:
            content = _manifest_content(path)
        except (FileNotFoundError, NotADirectoryError):
            what = "has no manifest.json, so it is not a committed checkpoint"
            raise Unreadable(
                f"{folder} {what if folder.is_dir() else 'is not a checkpoint folder'}"
            ) from None
        except OSError as error:
            raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
        return decode_manifest(content, str(path))

    def files(self, name: str) -> dict[str, int]:
        try:
            return {p.name: p.stat().st_size for p in self.path(name).iterdir() if p.is_file()}
        except OSError as error:
            raise Unreadable(f"{self.path(name)} cannot be read: {error.strerror}") from error

    def reader(self, name: str) -> FolderReader:
        return FolderReader(self.path(name))

    def begin(self, name: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.partial(name).mkdir()

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[None]:
        """Have `sweep` leave the folder of a checkpoint that this process writes during the block.

        The lock lies on the file that becomes the manifest, and ends with the process. Where the
        file system has no locks, only the names of attempts keep folders apart.
        """
        descriptor = open_added(self.partial(name) / MANIFEST)
        try:
            try_lock(descriptor)
            yield
        finally:
            os.close(descriptor)

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

    def publish(self, name: str, manifest: bytes, claim: Callable[[], None] = lambda: None) -> None:
        partial, final = self.partial(name), self.path(name)
        write_synced(partial / MANIFEST, manifest)
        sync(partial)
        claim()
        if os.path.lexists(final):
            raise FileExistsError(f"{final} is there already")
        try:
            # Of a folder that came meanwhile: rename never replaces one that is not empty.
            partial.rename(final)
        except OSError as error:
            if os.path.lexists(final):
                raise FileExistsError(f"{final} is there already") from error
            raise
        sync(self.root)

    def set_aside(self, name: str) -> str:
        return set_aside(self.path(name)).name

    def point_latest(self, name: str) -> None:
        self._replace(LATEST, f"{name}\n".encode())

    def point_best(self, name: str) -> None:
        self._replace(BEST, f"{name}\n".encode())

    def owner(self) -> bytes:
        path = self.root / OWNER
        try:
            return read_regular(path, _MOST_OWNER_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def set_owner(self, content: bytes) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._replace(OWNER, content)

    def retain(self, keep: int, protected: Collection[str] = ()) -> list[str]:
        removed = superfluous(self, keep, protected)
        self.sweep()
        for name in removed:
            folder = self.path(name)
            folder.rename(folder.with_name(f"{name}.removed{PARTIAL}"))
        self.sweep()
        return removed

    def sweep(self) -> None:
        """Remove the folders of saves and removals that did not finish and no process works on."""
        for path in self.root.iterdir() if self.root.exists() else ():
            generation = unfinished_generation(path.name)
            given_up = generation is not None and 0 <= generation < self.generation
            if generation is None and not path.name.startswith(_FRESH):
                continue
            if given_up or not _is_written(path):
                # Its writer may still add to it; the next sweep removes the rest.
                with contextlib.suppress(OSError):
                    remove_entry(path)

    def free_bytes(self) -> int:
        """The bytes an ordinary user may still write here."""
        return free_bytes(self.root)

    def _replace(self, file: str, content: bytes) -> None:
        attempt = f".{self.attempt}" if self.attempt else ""
        fresh = self.root / f".{file}{attempt}{PARTIAL}"
        fresh.unlink(missing_ok=True)
        write_synced(fresh, content)
        fresh.replace(self.root / file)
        sync(self.root)


def _manifest_content(path: Path) -> bytes:
    """The content of a manifest; of another file, only its end."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - MANIFEST_END_BYTES))
        end = file.read(MANIFEST_END_BYTES)
        if not ends_manifest(end):
            return end
        file.seek(0)
        return read_whole(file, path)


def remove_entry(path: Path) -> None:
    """Remove a file, or a folder with its content. Of a link, only the link goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_written(folder: Path) -> bool:
    """Whether a live process writes a checkpoint to this folder; see `LocalStore.written`."""
    try:
        descriptor = open_descriptor(folder / MANIFEST, os.O_RDWR, follow=False)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)
