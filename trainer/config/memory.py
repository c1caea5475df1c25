"""The memory of this machine. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOUNT = Path("/sys/fs/cgroup")
_MOST_BYTES = 1 << 16
"""Of the list of a process's control groups."""


def machine_memory_bytes() -> int:
    """The memory that processes of this control group may use, in bytes. Local."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _limits():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            memory = min(memory, int(limit.read_text()))
    return memory


def _limits() -> Iterator[Path]:
    """The files with a memory limit of this process: its control group's, and those above it."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            groups = file.read(_MOST_BYTES).splitlines()
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
