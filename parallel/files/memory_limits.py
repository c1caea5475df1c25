"""The files in which the kernel tells the limits of a process's memory. Local."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from holdfast.parallel.reading import read_regular

_MOUNT = Path("/sys/fs/cgroup")
_MOST_BYTES = 1 << 16
"""Of the list of a process's control groups."""


def memory_limits(process: str = "self") -> Iterator[Path]:
    """The files with a memory limit of a process: its control group's, and those above it.

    Not all of them exist; a file without a limit says "max".

    Args:
        process: its number, or "self".
    """
    try:
        found = read_regular(Path(f"/proc/{process}/cgroup"), _MOST_BYTES)
        groups = found.decode(errors="replace").splitlines()
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
