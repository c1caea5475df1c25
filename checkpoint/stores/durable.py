"""Local files that survive a power cut, and the free space for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from holdfast.parallel.reading import open_descriptor


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file; it is whole on the disk when this returns.

    A file that is there keeps its locks; a link, or another user's file, is refused.
    """
    descriptor = open_descriptor(path, os.O_WRONLY | os.O_CREAT, follow=False, own=True)
    with os.fdopen(descriptor, "wb") as file:
        file.truncate()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def open_written(path: Path) -> BinaryIO:
    """Open a file that this user has made, to write at any place of it; a link is not followed."""
    return os.fdopen(open_descriptor(path, os.O_RDWR, follow=False, own=True), "r+b")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """The bytes an ordinary user may still write to the filesystem of `path`.

    `path` need not exist yet.
    """
    place = path
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def set_aside(path: Path) -> Path:
    """Rename a file or folder, of which nothing is lost. Returns the new name.

    The new name is free and begins with `superseded-`. Of a link, the link is renamed.
    """
    free = wanted = path.with_name(f"superseded-{path.name}")
    number = 1
    while os.path.lexists(free):
        number += 1
        free = wanted.with_name(f"{wanted.name}-{number}")
    path.rename(free)
    return free
