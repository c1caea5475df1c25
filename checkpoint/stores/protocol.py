"""The protocol of a checkpoint store, and the rules of a commit, which all stores share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from holdfast.checkpoint.format import Manifest
from holdfast.checkpoint.loading import ByteReader
from holdfast.parallel.errors import CheckpointError


class CheckpointStore(Protocol):
    """A folder of checkpoints, on a disk or behind a URL. Every call is local.

    One process at a time writes to it. A folder without a manifest is not a checkpoint. Reading
    raises CheckpointError; writing raises OSError or an error of the store's driver.
    """

    def place_of(self, name: str) -> str:
        """The path or URL of a checkpoint."""
        ...

    def names(self) -> list[str]:
        """The names of the committed checkpoints, oldest first."""
        ...

    def has(self, name: str) -> bool:
        """Whether `name`, which may be any text, is a committed checkpoint."""
        ...

    def latest(self) -> str:
        """The content of the file `latest`; empty without one."""
        ...

    def manifest(self, name: str) -> Manifest:
        """The manifest. Raises CheckpointError if it is missing or damaged."""
        ...

    def files(self, name: str) -> dict[str, int]:
        """The files present, with their sizes in bytes."""
        ...

    def reader(self, name: str) -> ByteReader:
        """A reader of the checkpoint's bytes; the caller closes it."""
        ...

    def begin(self, name: str) -> None:
        """Prepare for a new checkpoint.

        A store that one save writes removes leftovers of others, which bear names of their own: a
        folder with a checkpoint's name stays, with or without a manifest. A store that is uploaded
        to keeps the files that an earlier upload of the same checkpoint has sent.
        """
        ...

    def put(self, source: Path, name: str, file: str) -> None:
        """Copy a local file, of any size, into a checkpoint that is not committed yet."""
        ...

    def write(self, name: str, file: str, content: bytes) -> None:
        """Write a small file into a checkpoint that is not committed yet."""
        ...

    def publish(self, name: str, manifest: bytes) -> None:
        """Write the manifest, which turns the written files into a checkpoint at one instant."""
        ...

    def point_latest(self, name: str) -> None:
        """Make `latest` name a committed checkpoint, at one instant."""
        ...

    def retain(self, keep: int, protected: Collection[str] = ()) -> list[str]:
        """Remove all checkpoints but the newest `keep` and `protected`. Returns their names.

        A checkpoint loses its name or its manifest first, so that a half-removed folder is not
        taken for one.
        """
        ...

    def owner(self) -> bytes:
        """The content of the file that says whose the checkpoints are; empty without one."""
        ...

    def set_owner(self, content: bytes) -> None:
        """Replace the content of that file, at one instant."""
        ...


@dataclass(frozen=True, slots=True)
class Retention:
    """The checkpoints that stay in a store."""

    keep: int = 0
    """The number of newest checkpoints that stay; 0: all."""
    protected: Callable[[], Collection[str]] = field(default=lambda: ())
    """The names of other checkpoints that must stay for now."""


def commit(
    store: CheckpointStore,
    name: str,
    manifest: bytes,
    *,
    files: Mapping[str, bytes] | None = None,
    retention: Retention = Retention(),
) -> None:
    """Make a checkpoint of the files that were written to `name`.

    A crash at any instant leaves the old state or the new one, because of the order: every file is
    there and synced before the manifest, the manifest is written before `latest`, and nothing is
    removed before `latest` names its replacement.

    Args:
        manifest: the bytes of manifest.json.
        files: contents of small files that are not written yet, by name.
        retention: the older checkpoints that stay.
    """
    for file, content in (files or {}).items():
        store.write(name, file, content)
    store.publish(name, manifest)
    store.point_latest(name)
    # The checkpoint stands; the next commit removes what could not be removed now.
    with contextlib.suppress(OSError):
        store.retain(retention.keep, retention.protected())


def readable(store: CheckpointStore) -> Iterator[tuple[str, Manifest]]:
    """The checkpoints that have a readable manifest, with it, newest first."""
    for name in reversed(store.names()):
        try:
            yield name, store.manifest(name)
        except CheckpointError:
            continue


def newest(store: CheckpointStore) -> str | None:
    """The newest checkpoint that has a readable manifest; None if there is none."""
    return next((name for name, _ in readable(store)), None)


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """One checkpoint of a store. Every call is local."""

    store: CheckpointStore
    name: str

    @property
    def place(self) -> str:
        """The checkpoint's path or URL."""
        return self.store.place_of(self.name)

    def manifest(self) -> Manifest:
        """The manifest. Raises CheckpointError if it is missing or damaged."""
        return self.store.manifest(self.name)

    def reader(self) -> ByteReader:
        """A reader of the checkpoint's bytes; the caller closes it."""
        return self.store.reader(self.name)

    def files(self) -> dict[str, int]:
        """The files present, with their sizes in bytes."""
        return self.store.files(self.name)
