"""The memory of this machine. Needs no torch."""

from __future__ import annotations

import contextlib
import os

from holdfast.parallel.files import memory_limits
from holdfast.parallel.reading import read_regular

_MOST_BYTES = 1 << 16
"""Of a limit."""


def machine_memory_bytes() -> int:
    """The memory that processes of this control group may use, in bytes. Local."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in memory_limits():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            memory = min(memory, int(read_regular(limit, _MOST_BYTES)))
    return memory
