"""The disks below some folders: what is written comes back, how fast, and how much room is left.

The file has no name and is gone with this process. It is read and written past the page cache
(O_DIRECT), which would otherwise answer for the disk; where a file system has no such way, it is
synced, and the cache is told to forget it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
from pathlib import Path
from time import perf_counter

from holdfast.launch.health.report import Check, failed
from holdfast.parallel.errors import size_text

_CHUNK_BYTES = 4 << 20
_LEAST_SHARE = 0.3
"""The rate of one disk was seen to differ by a factor of two from one time to the next."""


def check_disk(name: str, folder: Path, written_bytes: int, needed_bytes: int = 0) -> list[Check]:
    """The checks of the disk of a folder, which need not exist yet. Local.

    Args:
        name: the folder's part in a run, equal on all nodes.
        written_bytes: how much is written and read: a multiple of 4 MiB.
        needed_bytes: the room that a run needs there at least.
    """
    room, rate = f"room, {name}", f"rate of the disk, {name}"
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        found = os.statvfs(place)
        free_bytes = found.f_bavail * found.f_frsize
        needed_bytes = max(needed_bytes, written_bytes)
        free_gib = free_bytes / 2**30
        if free_bytes < needed_bytes:
            told = (
                f"{folder}: {size_text(free_bytes)} are free, and {size_text(needed_bytes)} needed"
            )
            return [failed(room, free_gib, "GiB", told)]
        written_s, read_s, fault = _measured(place, written_bytes)
    except OSError as error:
        return [failed(room, 0.0, "GiB", f"{folder}: {error.strerror or error}")]
    if fault:
        return [failed(rate, 0.0, "MB/s", f"{folder}: {fault}")]
    mb = written_bytes / 1e6
    return [
        Check(room, free_gib, "GiB", limit=needed_bytes / 2**30),
        Check(f"{rate}, written", mb / written_s, "MB/s", "least", _LEAST_SHARE),
        Check(f"{rate}, read", mb / read_s, "MB/s", "least", _LEAST_SHARE),
    ]


def _measured(place: Path, size: int) -> tuple[float, float, str]:
    """The seconds to write and sync, and to read, a file; and what is wrong with what came back."""
    with (
        tempfile.TemporaryFile(dir=place, buffering=0) as file,
        contextlib.closing(mmap.mmap(-1, _CHUNK_BYTES)) as memory,
    ):
        descriptor = file.fileno()
        direct = _past_the_cache(descriptor)
        began_s = perf_counter()
        for number in range(size // _CHUNK_BYTES):
            memory[:] = _content(number)
            written = os.pwrite(descriptor, memory, number * _CHUNK_BYTES)
            if written != _CHUNK_BYTES:
                return 1.0, 1.0, f"only {written} of {_CHUNK_BYTES} bytes were written"
        os.fsync(descriptor)
        written_s = perf_counter() - began_s
        if not direct:
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        began_s = perf_counter()
        for number in range(size // _CHUNK_BYTES):
            read = os.preadv(descriptor, [memory], number * _CHUNK_BYTES)
            if read != _CHUNK_BYTES or memory[:] != _content(number):
                return 1.0, 1.0, f"byte {number * _CHUNK_BYTES} and after did not come back"
        return written_s, perf_counter() - began_s, ""


def _past_the_cache(descriptor: int) -> bool:
    """Have a file read and written past the page cache; whether that is possible."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return False
    return True


def _content(number: int) -> bytes:
    """Bytes that no other chunk has, and that do not shrink if a file system compresses."""
    return _NOISE[number % 251 :] + _NOISE[: number % 251]


_NOISE = os.urandom(_CHUNK_BYTES)
