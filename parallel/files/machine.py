"""The identity of the machine. Local.

Names do not tell machines apart: images and containers of a cluster may all be `localhost`, and one
machine may have a name in each of its namespaces.
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PIDS = Path("/proc/self/ns/pid")
_SHARED_MEMORY = Path("/dev/shm")


def machine_identity() -> str:
    """The machine on which this process runs, as 16 hexadecimal digits.

    Equal for processes that may share memory: under one boot of one kernel, they see each other's
    process ids and the same /dev/shm. Two containers on a host are two machines.
    """
    parts = (boot(), _number(_PIDS), _number(_SHARED_MEMORY))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def boot() -> str:
    """The running kernel's identifier, new with each boot; the host's name where it is hidden."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _number(path: Path) -> tuple[int, int]:
    """The file system and the number of what lies at a path; zeros if there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino
