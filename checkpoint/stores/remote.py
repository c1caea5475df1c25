"""A checkpoint store behind an fsspec URL; the manifest, written last, is the commit.

Each kind of URL needs its driver (s3fs, gcsfs, …) installed.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from holdfast.checkpoint.format import (
    BEST,
    LATEST,
    MANIFEST,
    OWNER,
    Manifest,
    decode_manifest,
    step_of,
)
from holdfast.checkpoint.loading import RemoteReader
from holdfast.checkpoint.stores.protocol import superfluous
from holdfast.parallel.errors import ConfigError, Unreadable, in_a_line

_PART_BYTES = 16 << 20
_MOST_BYTES = 1 << 16
"""The largest file beside the checkpoints."""
_T = TypeVar("_T")


class FsspecStore:
    """Checkpoints under a URL. Objects appear whole, so files need no temporary name."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        """Open the folder at a URL; nothing is sent yet.

        Args:
            url: the URL of the folder, e.g. `s3://bucket/run`.
            options: options of the driver; credentials and end points are usually in its own
                environment.
        Raises:
            ConfigError: no driver for this kind of URL is installed.
        """
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._filesystem, self._path = fsspec.url_to_fs(self.url, **(options or {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.path = {url!r} cannot be used: {error}") from error

    def place_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        def listed(path: str) -> list[str]:
            self._filesystem.invalidate_cache()
            try:
                return self._filesystem.ls(path, detail=False)
            except FileNotFoundError:
                return []

        found = self._asked("", lambda _: listed(self._path))
        names = [posixpath.basename(path.rstrip("/")) for path in found]
        steps = sorted((step, n) for n in names if (step := step_of(n)) is not None)
        return [name for _, name in steps if self.has(name)]

    def has(self, name: str) -> bool:
        return self._asked(name, lambda path: self._filesystem.exists(f"{path}/{MANIFEST}"))

    def latest(self) -> str:
        return self._content(LATEST).decode().strip()

    def best(self) -> str:
        return self._content(BEST).decode().strip()

    def manifest(self, name: str) -> Manifest:
        reader = self.reader(name)
        try:
            content = reader.read_file(MANIFEST)
        finally:
            reader.close()
        return decode_manifest(content, f"{self.place_of(name)}/{MANIFEST}")

    def files(self, name: str) -> dict[str, int]:
        def listed(path: str) -> dict[str, int]:
            return {
                posixpath.basename(found["name"]): int(found["size"])
                for found in self._filesystem.ls(path, detail=True)
                if found["type"] == "file"
            }

        return self._asked(name, listed)

    def reader(self, name: str) -> RemoteReader:
        return RemoteReader(self.place_of(name), self._filesystem, self._object(name))

    def begin(self, name: str) -> None:
        self._filesystem.makedirs(self._object(name), exist_ok=True)

    def put(self, source: Path, name: str, file: str) -> None:
        self.begin(name)
        target = f"{self._object(name)}/{file}"
        self._filesystem.put_file(str(source), target, chunksize=_PART_BYTES)
        self._filesystem.invalidate_cache()
        size, wanted = self._filesystem.size(target), source.stat().st_size
        if size != wanted:
            raise OSError(f"has {size} bytes after the upload, not {wanted}")

    def write(self, name: str, file: str, content: bytes) -> None:
        self._filesystem.pipe_file(f"{self._object(name)}/{file}", content)

    def discard(self, name: str) -> None:
        """Remove the files of a checkpoint that was not committed; of a committed one, none."""
        if not self.has(name):
            self._filesystem.rm(self._object(name), recursive=True)

    def publish(self, name: str, manifest: bytes, claim: Callable[[], None]) -> None:
        claim()
        if self.has(name):
            raise FileExistsError(f"{self.place_of(name)} is there already")
        self.write(name, MANIFEST, manifest)

    def set_aside(self, name: str) -> str:
        free = wanted = f"superseded-{name}"
        number = 1
        while self._filesystem.exists(self._object(free)):
            number += 1
            free = f"{wanted}-{number}"
        self.begin(free)
        # Stores of objects cannot rename a folder. The manifest arrives last and goes first, so
        # that what is half copied, or half removed, is no checkpoint.
        for file in sorted(self.files(name), key=lambda file: file == MANIFEST):
            source, target = (f"{self._object(place)}/{file}" for place in (name, free))
            self._filesystem.copy(source, target)
        self._filesystem.rm_file(f"{self._object(name)}/{MANIFEST}")
        self._filesystem.rm(self._object(name), recursive=True)
        return free

    def point_latest(self, name: str) -> None:
        self._filesystem.pipe_file(self._object(LATEST), f"{name}\n".encode())

    def point_best(self, name: str) -> None:
        self._filesystem.pipe_file(self._object(BEST), f"{name}\n".encode())

    def owner(self) -> bytes:
        return self._content(OWNER)

    def set_owner(self, content: bytes) -> None:
        self._filesystem.makedirs(self._path, exist_ok=True)
        self._filesystem.pipe_file(self._object(OWNER), content)

    def retain(self, keep: int, protected: Collection[str] = ()) -> list[str]:
        removed = superfluous(self, keep, protected)
        for name in removed:
            self._filesystem.rm_file(f"{self._object(name)}/{MANIFEST}")
            self._filesystem.rm(self._object(name), recursive=True)
        return removed

    def _content(self, file: str) -> bytes:
        """The content of a file beside the checkpoints; empty without it."""

        def read(path: str) -> bytes:
            self._filesystem.invalidate_cache()
            if not self._filesystem.exists(path):
                return b""
            return self._filesystem.cat_file(path, start=0, end=_MOST_BYTES)

        return self._asked(file, read)

    def _object(self, name: str) -> str:
        """An object's name in the driver's spelling."""
        return f"{self._path}/{name}"

    def _asked(self, name: str, ask: Callable[[str], _T]) -> _T:
        # Each driver has its own kinds of errors; they all mean the same here.
        try:
            return ask(self._object(name))
        except Exception as error:
            raise Unreadable(f"{self.place_of(name)} cannot be read: {in_a_line(error)}") from error
