"""The protocol of a store of checkpoints, and the rules of a commit, equal for every store."""

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

    One process at a time writes to it. What has no manifest is not a checkpoint. Reading raises
    CheckpointError; writing raises OSError or an error of the store's driver.
    """

    def place_of(self, name: str) -> str:
        """The path or URL of a checkpoint."""
        ...

    def names(self) -> list[str]:
        """The committed checkpoints of steps, the oldest first."""
        ...

    def has(self, name: str) -> bool:
        """Whether `name`, which may be any name, is a committed checkpoint."""
        ...

    def latest(self) -> str:
        """What the file `latest` says; empty without one."""
        ...

    def manifest(self, name: str) -> Manifest:
        """Raises CheckpointError: there is none, or it is damaged."""
        ...

    def files(self, name: str) -> dict[str, int]:
        """The files that are there, with their sizes in bytes."""
        ...

    def reader(self, name: str) -> ByteReader:
        """What reads the bytes of a checkpoint; its user closes it."""
        ...

    def begin(self, name: str) -> None:
        """Make room for a new checkpoint.

        A store that is written by one save removes what others left unfinished; one that is
        uploaded to keeps the files that an earlier upload of the same checkpoint has sent.
        """
        ...

    def put(self, source: Path, name: str, file: str) -> None:
        """Copy a local file, of any size, into a checkpoint that is not committed yet."""
        ...

    def write(self, name: str, file: str, content: bytes) -> None:
        """Write a small file of a checkpoint that is not committed yet."""
        ...

    def publish(self, name: str, manifest: bytes) -> None:
        """Write the manifest, and with it make a checkpoint of what was written, at one instant."""
        ...

    def point_latest(self, name: str) -> None:
        """Make `latest` name a committed checkpoint, at one instant."""
        ...

    def retain(self, keep: int, protected: Collection[str] = ()) -> list[str]:
        """Remove all but the newest `keep` checkpoints (0: none) and `protected`; returns which.

        The manifest goes first, so that a folder half removed is not taken for a checkpoint.
        """
        ...


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay in a store."""

    keep: int = 0
    """How many of the newest; 0: all."""
    protected: Callable[[], Collection[str]] = field(default=lambda: ())
    """Names of others that must stay for now."""


def commit(
    store: CheckpointStore,
    name: str,
    manifest: bytes,
    *,
    files: Mapping[str, bytes] | None = None,
    retention: Retention = Retention(),
) -> None:
    """Make what was written to `name` a checkpoint.

    A crash at any instant leaves the old state or the new one. The order is the rule: every file is
    there and synced before the manifest, the manifest before `latest`, and nothing is removed
    before `latest` points to what replaces it.

    Args:
        manifest: the bytes of manifest.json.
        files: small files that are not written yet, by name.
        retention: which older checkpoints stay.
    """
    for file, content in (files or {}).items():
        store.write(name, file, content)
    store.publish(name, manifest)
    store.point_latest(name)
    # The checkpoint stands; what could not be removed is removed by the next commit.
    with contextlib.suppress(OSError):
        store.retain(retention.keep, retention.protected())


def readable(store: CheckpointStore) -> Iterator[tuple[str, Manifest]]:
    """The checkpoints with a readable manifest, and that, the newest first."""
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
        """Its path or URL."""
        return self.store.place_of(self.name)

    def manifest(self) -> Manifest:
        """Raises CheckpointError: there is none, or it is damaged."""
        return self.store.manifest(self.name)

    def reader(self) -> ByteReader:
        """What reads its bytes; its user closes it."""
        return self.store.reader(self.name)

    def files(self) -> dict[str, int]:
        """The files that are there, with their sizes in bytes."""
        return self.store.files(self.name)
