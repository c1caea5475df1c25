"""Scratch folders: temporary folders that the next start removes if their process was killed.

A scratch folder holds a mark, a file that is locked while its process or one that it forked lives.
A sweep removes this user's folders with a mark that is not locked, and never follows a link. A
process whose new folder was swept before the lock held notices it, and makes another. So neither
clock nor process id decides. Where a file system has no locks, nothing is swept. Local.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files.locks import is_at, try_lock
from holdfast.parallel.files.machine import boot
from holdfast.parallel.reading import parse_json

PREFIX = "holdfast-scratch-"
"""The beginning of a folder's name in the system's folder for temporary files."""
_MARK = ".holdfast-mark"
_MARK_BYTES = 4096
_ATTEMPTS = 100
_LEAST_ROOM = 4 << 20
"""Bytes that are free in the system's folder: a run has about 100 KiB for each rank in it."""
_TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_INSTALLATION = Path("/etc/machine-id")


@contextlib.contextmanager
def scratch_folder(inside: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """A new folder of this user alone, which is removed at the end of the block. Sweeps first.

    Args:
        inside: the folder in which it is made; None: the system's folder for temporary files.
        prefix: the beginning of its name, which only scratch folders have there.
    Raises:
        OSError: it cannot be made in that folder.
        ConfigError: it cannot be made in the system's, or has no room there.
    """
    try:
        sweep_scratch(inside, prefix)
        if inside is None:
            _require_room(Path(tempfile.gettempdir()))
        folder, descriptor = _marked(inside, prefix)
    except OSError as error:
        if inside is not None:
            raise
        raise ConfigError(
            f"no temporary folder can be made: {error.strerror or error}; set TMPDIR to a folder "
            "with room that you may write"
        ) from error
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)
        os.close(descriptor)


def _require_room(place: Path) -> None:
    """Check that the system's folder has room for what the processes of a run tell each other.

    Raises:
        OSError: it has not.
    """
    found = os.statvfs(place)
    if found.f_blocks and found.f_bavail * found.f_frsize < _LEAST_ROOM:
        raise OSError(
            errno.ENOSPC, f"{place} has less than {_LEAST_ROOM >> 20} MiB of room", str(place)
        )


def sweep_scratch(inside: Path | None = None, prefix: str = PREFIX) -> list[Path]:
    """Remove the scratch folders that ended processes of this user left. Returns them.

    What cannot be removed, or is not surely left behind, stays.
    """
    place = inside or Path(tempfile.gettempdir())
    gone = []
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(place)):
            if entry.name.startswith(prefix):
                with contextlib.suppress(OSError):
                    if _sweep(place / entry.name):
                        gone.append(place / entry.name)
    return gone


@contextlib.contextmanager
def torch_caches_in(folder: Path) -> Iterator[None]:
    """Have torch look for compiled code in a folder during the block, unless the user named one.

    torch makes the folder of its cache when an optimizer is made or a layer is recomputed, though
    nothing is compiled. By default it would make one among the temporary files, and leave it there.
    """
    named = os.environ.get(_TORCH_CACHE)
    if named is not None:
        yield
        return
    os.environ[_TORCH_CACHE] = str(folder.absolute())
    try:
        yield
    finally:
        os.environ.pop(_TORCH_CACHE, None)


def _marked(inside: Path | None, prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor of its locked mark."""
    for _ in range(_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=inside))
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(folder / _MARK, flags, 0o600)
        except FileNotFoundError:
            continue  # swept
        try:
            if try_lock(descriptor) is not False:
                os.write(descriptor, json.dumps(_here()).encode())
                if is_at(descriptor, folder / _MARK):
                    return folder, descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(folder)
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError(errno.EAGAIN, "each new folder was removed at once", str(inside or ""))


def _sweep(folder: Path) -> bool:
    """Remove a folder if it is one that an ended process of this user left."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        return False
    try:
        descriptor = os.open(folder / _MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        os.rmdir(folder)  # only an empty one: its process ended, or makes another
        return True
    try:
        if not (try_lock(descriptor) and is_at(descriptor, folder / _MARK)):
            return False
        if not _is_of_this_machine(os.pread(descriptor, _MARK_BYTES, 0), folder):
            return False
        _remove(folder)
    finally:
        os.close(descriptor)
    return True


def _is_of_this_machine(mark: bytes, folder: Path) -> bool:
    """Whether a lock of the mark would be seen here: on shared disks, some machines keep theirs."""
    if not mark:  # its process ended before the folder was used, or makes another
        return os.listdir(folder) == [_MARK]
    try:
        written = parse_json(mark)
        here = _here()
        rebooted = here["installation"] and {**written, "boot": here["boot"]} == here
        return bool(written["boot"] == here["boot"] or rebooted)
    except (ValueError, KeyError, TypeError):
        return False


def _here() -> dict[str, str]:
    """The machine: its boot, its host name, and the installation, which stay the same over boots.

    Machines may have one name, and containers often have no installation.
    """
    try:
        installation = _INSTALLATION.read_text().strip()
    except OSError:
        installation = ""
    return {"boot": boot(), "host": socket.gethostname(), "installation": installation}


def _remove(folder: Path) -> None:
    """Remove a folder, its mark last: what a kill leaves of it is still a scratch folder.

    It is renamed first, so that no process that is about to end makes files in it meanwhile.
    """
    gone = folder.rename(folder.with_name(f"{folder.name}.gone"))
    for entry in list(os.scandir(gone)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _MARK:
            os.unlink(entry.path)
    os.unlink(gone / _MARK)
    os.rmdir(gone)
