"""Locks of files. Each ends with the processes that hold it, however these end. Local."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from holdfast.parallel.reading import open_descriptor

_POLL_S = 0.05


def open_lock(path: Path) -> int:
    """Open the file of a lock, which is made if there is none. Returns its descriptor.

    The name may be known to others: a link is not followed, a pipe does not block, and no other
    user can open the file, and so have the lock.

    Raises:
        PermissionError: it is a link, no regular file, or another user's.
        OSError: it cannot be opened.
    """
    descriptor = open_descriptor(path, os.O_RDWR | os.O_CREAT, 0o600, follow=False, own=True)
    with contextlib.suppress(OSError):  # an earlier version made it for all to read
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            os.fchmod(descriptor, 0o600)
    return descriptor


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Take the lock of an open file or folder.

    Returns:
        False if another process has it; None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def await_lock(descriptor: int, left_s: Callable[[], float]) -> bool:
    """Take the lock of an open file once no other process has it; see `try_lock`.

    Args:
        left_s: returns the seconds that are left to wait; 0 or less: it is given up.
    Returns:
        False if another process still has it.
    """
    while try_lock(descriptor) is False:
        if left_s() <= 0:
            return False
        time.sleep(_POLL_S)
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
