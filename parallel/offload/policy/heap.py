"""glibc malloc settings that return freed memory to the system.

Torch's tensors are aligned, and aligned allocations leave remainders of less than 128 bytes around
each block. glibc (seen with 2.36) keeps these remainders in caches per thread (tcache, fastbins).
There they keep freed blocks from merging, so a new block does not fit where one of its size was.
Without these caches it fits. They can be switched off only when a process starts, by GLIBC_TUNABLES
(glibc manual, section 39.2).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

TUNABLES = "GLIBC_TUNABLES"
_SETTINGS = {
    "glibc.malloc.tcache_count": "0",
    "glibc.malloc.mxfast": "0",
    # The system provides larger blocks page by page.
    "glibc.malloc.mmap_threshold": str(32 << 20),
    # The heap keeps the size that a step needs: returned memory is asked for again in the next
    # step, as pages of zeros.
    "glibc.malloc.trim_threshold": str(1 << 40),
    # The heap in pages of 2 MiB (from 2.35 on): requests to a drive pin a page at a time.
    "glibc.malloc.hugetlb": "1",
}
_OLD_NAMES = {
    "glibc.malloc.mmap_threshold": "MALLOC_MMAP_THRESHOLD_",
    "glibc.malloc.trim_threshold": "MALLOC_TRIM_THRESHOLD_",
}


def compact_heap_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to an environment, so that processes started in it have a compact heap.

    Existing settings stay as they are. The result is empty when there is nothing to add. Pure.
    """
    there = [part for part in environment.get(TUNABLES, "").split(":") if part]
    names = {part.split("=", 1)[0] for part in there}
    names |= {name for name, old in _OLD_NAMES.items() if old in environment}
    missing = [f"{name}={value}" for name, value in _SETTINGS.items() if name not in names]
    return {TUNABLES: ":".join(there + missing)} if missing else {}


def restart_with_compact_heap() -> None:
    """Replace this process by the same command with a compact heap; return if nothing changes.

    Call it first in a program: everything that the process has done so far is done again. It does
    nothing where the settings are made already, or with another C library than glibc. Child
    processes inherit the settings. Local.
    """
    added = compact_heap_environment(os.environ)
    if not added or not sys.executable or not _has_glibc():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **added})


def _has_glibc() -> bool:
    names = getattr(os, "confstr_names", {})
    return "CS_GNU_LIBC_VERSION" in names and bool(os.confstr("CS_GNU_LIBC_VERSION"))
