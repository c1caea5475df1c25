"""The heap in which what is freed is used again: its settings, and that they hold in a real
process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from holdfast.parallel.offload.policy.heap import TUNABLES, compact_heap_environment

LIVE_MIB = 64
PROGRAM = """
import sys
from collections import deque
from pathlib import Path

if sys.argv[1] == "compact":
    from holdfast.parallel.offload.policy.heap import restart_with_compact_heap
    restart_with_compact_heap()

import torch

def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) // 1024

before = status("VmRSS")
sizes = [1 << 20, 3 << 20, 1 << 19, 5 << 20, 2 << 20]  # bytes, as a layer saves them
alive, small, held = deque(), [], 0
for number in range(600):
    size = sizes[number % len(sizes)]
    while held + size > int(sys.argv[2]) << 20:
        # Not in the order of allocation, as writes end.
        gone = alive[1]
        del alive[1]
        held -= gone.numel()
        del gone
    alive.append(torch.empty(size, dtype=torch.uint8).fill_(1))
    held += size
    small.append([torch.empty(7), torch.empty(40)])
print(status("VmHWM") - before)
"""


def resident_mib(heap: str) -> int:
    """The highest resident set of a process that has `LIVE_MIB` in use at most."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environment.pop(TUNABLES, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, heap, str(LIVE_MIB)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.mp
def test_what_is_freed_is_used_again() -> None:
    compact = resident_mib("compact")
    assert compact < 2 * LIVE_MIB  # pages, and what torch itself takes
    assert compact < 0.5 * resident_mib("as it is")


def test_settings_of_the_user_are_kept() -> None:
    found = compact_heap_environment(
        {TUNABLES: "glibc.malloc.tcache_count=3:glibc.cpu.hwcaps=-AVX2"}
    )
    settings = found[TUNABLES].split(":")
    assert settings[:2] == ["glibc.malloc.tcache_count=3", "glibc.cpu.hwcaps=-AVX2"]
    assert sum(setting.startswith("glibc.malloc.tcache_count=") for setting in settings) == 1
    assert "glibc.malloc.mxfast=0" in settings


def test_the_older_names_of_settings_count() -> None:
    found = compact_heap_environment({"MALLOC_MMAP_THRESHOLD_": "131072"})
    assert "mmap_threshold" not in found[TUNABLES]


def test_a_compact_heap_needs_nothing_more() -> None:
    once = compact_heap_environment({"HOME": "/"})
    assert compact_heap_environment({"HOME": "/", **once}) == {}
