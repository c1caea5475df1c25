"""The memory of this machine. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from holdfast.parallel.reading import read_regular

_MOUNT = Path("/sys/fs/cgroup")
_MOST_BYTES = 1 << 16
"""Of the list of a process's control groups, and of a limit."""


def machine_memory_bytes() -> int:
    """The memory that processes of this control group may use, in bytes. Local."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _limits():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            memory = min(memory, int(read_regular(limit, _MOST_BYTES)))
    return memory


def _limits() -> Iterator[Path]:
    """The files with a memory limit of this process: its control group's, and those above it."""
    try:
        groups = read_regular(Path("/proc/self/cgroup"), _MOST_BYTES).decode().splitlines()
    except OSError:
        groups = []
    for line in ("0::/", "1:memory:/", *groups):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            folder, name = _MOUNT, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = _MOUNT / "memory", "memory.limit_in_bytes"
        else:
            continue
        place = PurePosixPath(group)
        for above in (place, *place.parents):
            yield folder / above.relative_to("/") / name
