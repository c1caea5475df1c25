"""Files that are written under names which others may know: no link is followed. Local.

In a folder that others may write, something may stand under such a name already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from holdfast.parallel.reading import open_descriptor

_ATTEMPTS = 100


def open_added(path: Path) -> int:
    """Open a file to add to its end; it is made if there is none. Returns its descriptor.

    Raises:
        OSError: it is a link or no regular file, or cannot be opened for reading and writing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    return open_descriptor(path, flags, 0o644, follow=False)


def create_file(path: Path) -> BinaryIO:
    """Make a file in the place of one that an ended process left; a link there is replaced.

    Raises:
        OSError: it cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_ATTEMPTS):
        try:
            return os.fdopen(os.open(path, flags, 0o644), "wb+")
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    raise FileExistsError(errno.EEXIST, "other processes make it again and again", str(path))


def write_own_file(path: Path, content: bytes, *, first: bool = False) -> None:
    """Make or replace a file that only this user can read, at one instant.

    Args:
        first: nothing is replaced, also if several processes do this at once.
    Raises:
        FileExistsError: `first`, and the file is there.
        OSError: it cannot be written.
    """
    descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        if not first:
            os.replace(fresh, path)
        else:
            os.link(fresh, path)
            os.unlink(fresh)
    except BaseException:
        os.unlink(fresh)
        raise
