"""The lock of a folder that one run at a time writes to. Local."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import open_lock, try_lock
from holdfast.parallel.reading import open_descriptor

LOCK = ".lock"


@contextlib.contextmanager
def lock_folder(folder: Path, key: str, run: str = "") -> Iterator[None]:
    """Make a folder, and keep other processes from writing to it during the block.

    Processes that this one forks hold the lock with it.

    Args:
        key: the option or key that names the folder, for messages.
        run: the run that the lock is for, where the folder does not tell.
    Raises:
        ConfigError: another process has the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(folder / LOCK)
    except OSError as error:
        raise unwritable(folder, error, key) from error
    try:
        taken = try_lock(descriptor)
        if taken is None:
            raise ConfigError(
                f"{folder} lies on a file system without locks of files, which keep two runs from "
                f"writing there; name another folder with {key}"
            )
        if not taken:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            raise ConfigError(
                f"{folder} is in use by another run ({holder or 'unknown process'}); wait for it, "
                f"stop it, or name another folder with {key}"
            )
        with contextlib.suppress(OSError):  # the lock holds on a full disk, too
            os.ftruncate(descriptor, 0)
            holder = f"pid {os.getpid()} on {socket.gethostname()}"
            os.pwrite(descriptor, f"{holder}{run and f' for {run}'}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of a folder."""
    try:
        descriptor = open_descriptor(folder / LOCK, os.O_RDONLY, follow=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def unwritable(folder: Path, error: OSError, key: str = "--out") -> ConfigError:
    """The error of a folder that cannot be written."""
    return ConfigError(
        f"{error.filename or folder} cannot be written: {error.strerror}; name another folder with "
        f"{key}"
    )
