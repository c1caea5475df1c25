"""The memory of this machine. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def machine_memory_bytes() -> int:
    """The memory that processes of this control group may use, in bytes. Local."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            memory = min(memory, int(Path(limit).read_text()))
    return memory
