"""The checkpoint stores by scheme, and the search for a checkpoint at a path or URL."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from holdfast.checkpoint.format import BEST, LATEST, Manifest, place_fault, scheme_of
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.protocol import CheckpointStore, StoredCheckpoint, newest
from holdfast.checkpoint.stores.remote import FsspecStore
from holdfast.parallel.errors import ConfigError, Unreadable, shown

PathOrUrl = str | os.PathLike[str]
"""A path, or a URL of any scheme that a store or an fsspec driver serves."""

STORES: Mapping[str, Callable[[str], CheckpointStore]] = {
    "": lambda path: LocalStore(Path(path)),
}
"""Stores by scheme; the empty scheme is that of a path. fsspec's registry serves other schemes."""


def open_store(place: PathOrUrl) -> CheckpointStore:
    """The store of the folder of checkpoints at a path or URL.

    Raises:
        ConfigError: it is neither a path nor a URL, or neither a store nor a driver of fsspec
            serves the scheme.
    """
    text = _checked(place)
    return STORES.get(scheme_of(text), FsspecStore)(text)


def checkpoint_at(place: PathOrUrl) -> StoredCheckpoint:
    """The checkpoint at exactly this path or URL; its existence is not checked."""
    folder, name = _split(_checked(place))
    return StoredCheckpoint(open_store(folder), name)


def read_manifest(place: PathOrUrl) -> Manifest:
    """The manifest of the checkpoint at a path or URL.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    return checkpoint_at(place).manifest()


def find_checkpoint(place: PathOrUrl) -> StoredCheckpoint:
    """The checkpoint at a path or URL: the folder itself, its `latest` or `best`, or the newest.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    text = os.fspath(place)
    found = checkpoint_at(text)
    pointers = {LATEST: found.store.latest, BEST: found.store.best}
    if found.name in pointers and (pointed := pointers[found.name]()):
        found = StoredCheckpoint(found.store, pointed)
    if found.name and found.store.has(found.name):
        return found
    for folder in (text, f"{text.rstrip('/')}/checkpoints"):
        store = open_store(folder)
        name = newest(store)
        if name is not None:
            return StoredCheckpoint(store, name)
    raise Unreadable(
        f"{text} is not a checkpoint, and there is none in it; name a folder with a "
        "manifest.json, a checkpoints folder or a run"
    )


def _checked(place: PathOrUrl) -> str:
    text = os.fspath(place)
    if fault := place_fault(text):
        raise ConfigError(f"{shown(text)} is {fault}")
    return text


def _split(place: str) -> tuple[str, str]:
    """The (folder, name) of a checkpoint's path or URL; a URL without a folder has no name."""
    scheme = scheme_of(place)
    if not scheme:
        path = Path(place)
        path = path if path.name else path.absolute()
        return str(path.parent), path.name
    folder, separator, name = place.removeprefix(f"{scheme}://").rstrip("/").rpartition("/")
    return (f"{scheme}://{folder}", name) if separator else (place, "")
