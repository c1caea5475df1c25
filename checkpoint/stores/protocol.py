"""The protocol of a checkpoint store, and the rules of a commit, which all stores share."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from holdfast.checkpoint.format import VALIDATION, Manifest, decode_manifest, same_content
from holdfast.checkpoint.loading import ByteReader
from holdfast.parallel.errors import CheckpointError

logger = logging.getLogger("holdfast.checkpoint")


Claim = Callable[[], None]
"""Raises an exception if the save that calls it was given up."""


class CheckpointStore(Protocol):
    """A folder of checkpoints, on a disk or behind a URL. Every call is local.

    A committed checkpoint is never written again. A folder without a manifest is not a checkpoint.
    Reading raises CheckpointError; writing raises OSError or an error of the store's driver.
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

        A local store has a folder of its own for each attempt. A store that is uploaded to keeps
        the files that an earlier upload of the same checkpoint has sent.
        """
        ...

    def put(self, source: Path, name: str, file: str) -> None:
        """Copy a local file, of any size, into a checkpoint that is not committed yet."""
        ...

    def write(self, name: str, file: str, content: bytes) -> None:
        """Write a small file into a checkpoint that is not committed yet."""
        ...

    def discard(self, name: str) -> None:
        """Remove the written files of a checkpoint that is not needed."""
        ...

    def publish(self, name: str, manifest: bytes, claim: Claim) -> None:
        """Turn the written files and the manifest into a checkpoint at one instant.

        Args:
            claim: called when all is synced, just before that instant.
        Raises:
            FileExistsError: there is something of this name already; it stays as it was.
        """
        ...

    def set_aside(self, name: str) -> str:
        """Rename a checkpoint, or what bears its name; its files stay. Returns the new name."""
        ...

    def point_latest(self, name: str) -> None:
        """Make `latest` name a committed checkpoint, at one instant."""
        ...

    def best(self) -> str:
        """The content of the file `best`; empty without one."""
        ...

    def point_best(self, name: str) -> None:
        """Make `best` name a committed checkpoint, at one instant."""
        ...

    def retain(self, keep: int, protected: Collection[str] = ()) -> list[str]:
        """Remove the checkpoints that `superfluous` names. Returns their names.

        A checkpoint loses its name or its manifest first, so that a half-removed folder is not
        taken for one. Leftovers of dead saves go as well.
        """
        ...

    def owner(self) -> bytes:
        """The content of the file that says whose the checkpoints are; empty without one."""
        ...

    def set_owner(self, content: bytes) -> None:
        """Replace the content of that file, at one instant."""
        ...


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoints that stay because their losses are the lowest."""

    keep: int
    """The number of them, at least 1."""
    name: str
    """The validation set whose losses count."""


@dataclass(frozen=True, slots=True)
class Retention:
    """The checkpoints that stay in a store."""

    keep: int = 0
    """The number of newest checkpoints that stay; 0: all."""
    protected: Callable[[], Collection[str]] = field(default=lambda: ())
    """The names of other checkpoints that must stay for now."""
    best: Best | None = None
    """Which stay beside these for their losses; None: none."""


def commit(
    store: CheckpointStore,
    name: str,
    manifest: bytes,
    *,
    files: Mapping[str, bytes] | None = None,
    retention: Retention = Retention(),
    claim: Claim = lambda: None,
) -> str:
    """Make a checkpoint of the files that were written to `name`.

    A crash at any instant leaves the old state or the new one, because of the order: every file is
    there and synced before the manifest, the manifest is written before `latest`, and nothing is
    removed before `latest` names its replacement. A checkpoint of this name that is there already
    stays if it has the same content, and is set aside if it has other content.

    Args:
        manifest: the bytes of manifest.json.
        files: contents of small files that are not written yet, by name.
        retention: the older checkpoints that stay.
        claim: asked before and after the checkpoint appears. A save that was given up meanwhile
            publishes nothing, or at least touches nothing else.
    Returns:
        A note for a person if a checkpoint was set aside; else empty.
    """
    for file, content in (files or {}).items():
        store.write(name, file, content)
    note = ""
    while True:
        try:
            store.publish(name, manifest, claim)
            break
        except FileExistsError:
            claim()
            if has_content(store, name, manifest):
                store.discard(name)
                break
            note = f"{store.place_of(name)} had other content, and is {store.set_aside(name)} now"
            logger.warning("%s", note)
    claim()
    store.point_latest(name)
    apply_retention(store, name, retention)
    return note


def apply_retention(store: CheckpointStore, name: str, retention: Retention) -> None:
    """Name the best checkpoint, and remove those that may go now that `name` is there.

    The next commit does what cannot be done now, because a disk refuses it.
    """
    with contextlib.suppress(OSError):
        best = [] if retention.best is None else best_names(store, retention.best)
        if best:
            store.point_best(best[0])
        store.retain(retention.keep, {name, *best, *retention.protected()})


def best_names(store: CheckpointStore, best: Best) -> list[str]:
    """The checkpoints with the lowest losses that are whole, best first.

    Each says its own losses in its manifest, so nothing else is remembered. Of two equal ones the
    older is better.
    """
    known: list[tuple[float, int, str]] = []
    for name, manifest in readable(store):
        losses = manifest.scalars.get(VALIDATION)
        loss = losses.get(best.name) if isinstance(losses, Mapping) else None
        if isinstance(loss, float) and math.isfinite(loss):
            known.append((loss, manifest.step, name))
    whole = (name for *_, name in sorted(known) if is_whole(store, name))
    return list(itertools.islice(whole, best.keep))


def has_content(store: CheckpointStore, name: str, manifest: bytes) -> bool:
    """Whether a whole checkpoint of this name and of the manifest's content is there."""
    if not (store.has(name) and is_whole(store, name)):
        return False
    return same_content(store.manifest(name), decode_manifest(manifest, name))


def is_whole(store: CheckpointStore, name: str) -> bool:
    """Whether a checkpoint has a readable manifest and all files in their sizes.

    Contents are not read; see `holdfast.checkpoint.tools.verify_checkpoint`.
    """
    try:
        manifest, sizes = store.manifest(name), store.files(name)
    except CheckpointError:
        return False
    return all(sizes.get(file) == entry.bytes for file, entry in manifest.files.items())


def superfluous(store: CheckpointStore, keep: int, protected: Collection[str]) -> list[str]:
    """The checkpoints that may go, oldest first: those older than `keep` that are whole.

    Args:
        keep: 0: none may go.
        protected: the names of others that stay.
    """
    names = store.names()
    found: list[str] = []
    whole = 0
    for name in reversed(names if 0 < keep < len(names) else []):
        if whole < keep:
            whole += is_whole(store, name)
        elif name not in protected:
            found.append(name)
    return found[::-1]


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
