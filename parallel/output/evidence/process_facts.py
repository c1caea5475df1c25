"""A process as the kernel sees it: its threads, the calls they are in, its memory. Linux.

The process is not asked, and not disturbed. Nothing here waits for a lock that it may hold. What
cannot be read, for lack of rights or because the process is gone, is left out.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from holdfast.parallel.files import memory_limits
from holdfast.parallel.output.evidence.record import MemoryFacts, ThreadFacts
from holdfast.parallel.reading import open_descriptor, read_regular

_PROC = Path("/proc")
_MOST_BYTES = 1 << 16
_MOST_THREADS = 64
_NO_LIMIT = 1 << 60
"""A limit of a control group from which on it is none."""
_MACHINE = platform.machine()
_CALLS = {
    "x86_64": {0: "read", 1: "write", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev"}
    | {74: "fsync", 75: "fdatasync", 2: "open", 257: "openat", 202: "futex", 7: "poll"}
    | {35: "nanosleep", 230: "clock_nanosleep", 232: "epoll_wait", 281: "epoll_pwait", 5: "fstat"},
    "aarch64": {63: "read", 64: "write", 67: "pread64", 68: "pwrite64", 65: "readv", 66: "writev"}
    | {82: "fsync", 83: "fdatasync", 56: "openat", 98: "futex", 73: "ppoll", 80: "fstat"}
    | {101: "nanosleep", 115: "clock_nanosleep", 22: "epoll_pwait"},
}
"""The numbers of the system calls in which a process may be found waiting."""
_OF_A_FILE = ("read", "write", "pread64", "pwrite64", "readv", "writev", "fsync", "fdatasync")
_OF_A_NAME = {"open": 0, "openat": 1}
"""The calls that are given a name, and the number of that argument."""


def threads_of(pid: int) -> tuple[ThreadFacts, ...]:
    """The threads of a process, the main one first; empty if it is gone."""
    try:
        numbers = sorted(int(name) for name in os.listdir(_PROC / str(pid) / "task"))
    except OSError:
        return ()
    found = (_thread(pid, number) for number in numbers[:_MOST_THREADS])
    return tuple(thread for thread in found if thread is not None)


def _thread(pid: int, number: int) -> ThreadFacts | None:
    folder = _PROC / str(pid) / "task" / str(number)
    before, _, after = _text(folder / "stat").rpartition(")")
    if not after:
        return None
    name, state = before.partition("(")[2], after.split()[0]
    waits_in = _text(folder / "wchan").strip()
    stack = _text(folder / "stack").strip() if state == "D" or number == pid else ""
    call = "" if state == "R" else _call(pid, folder)
    return ThreadFacts(number, name, state, "" if waits_in == "0" else waits_in, call, stack)


def _call(pid: int, folder: Path) -> str:
    """The system call that a thread is in, for a person."""
    words = _text(folder / "syscall").split()
    if len(words) < 3 or not words[0].isdigit():
        return ""
    name = _CALLS.get(_MACHINE, {}).get(int(words[0]), f"number {words[0]}")
    if name in _OF_A_FILE:
        try:
            return f"{name} of {os.readlink(_PROC / str(pid) / 'fd' / str(int(words[1], 16)))}"
        except (OSError, ValueError):
            return name
    if name in _OF_A_NAME:
        told = _name_at(pid, int(words[1 + _OF_A_NAME[name]], 16))
        return f"{name} of {told}" if told else name
    return name


def _name_at(pid: int, address: int) -> str:
    """The name of a file in the memory of a process; empty if it cannot be read."""
    try:
        descriptor = open_descriptor(_PROC / str(pid) / "mem", os.O_RDONLY)
    except OSError:
        return ""
    try:
        # A read beyond a page that is there would fail: up to its end is enough for most names.
        size = min(os.sysconf("SC_PAGE_SIZE") - address % os.sysconf("SC_PAGE_SIZE"), 1024)
        return os.pread(descriptor, size, address).split(b"\0")[0].decode(errors="replace")
    except (OSError, OverflowError):
        return ""
    finally:
        os.close(descriptor)


def memory_of(pid: int) -> MemoryFacts:
    """The memory of a process, and its limits; nothing is known of one that is gone."""
    status = _text(_PROC / str(pid) / "status")
    limit = group = kills = 0
    for path in memory_limits(str(pid)):
        text = _text(path).strip()
        if text.isdigit() and int(text) < min(limit or _NO_LIMIT, _NO_LIMIT):
            limit = int(text)
            used = "memory.current" if path.name == "memory.max" else "memory.usage_in_bytes"
            used_text = _text(path.with_name(used)).strip()
            group = int(used_text) if used_text.isdigit() else 0
        if found := re.search(r"^oom_kill (\d+)$", _text(path.with_name("memory.events")), re.M):
            kills = max(kills, int(found[1]))
    space = re.search(r"^Max address space +(\d+)", _text(_PROC / str(pid) / "limits"), re.M)
    return MemoryFacts(
        resident_bytes=_kib(status, "VmRSS"),
        peak_bytes=_kib(status, "VmHWM"),
        swapped_bytes=_kib(status, "VmSwap"),
        group_bytes=group,
        limit_bytes=limit,
        address_limit_bytes=int(space[1]) if space else 0,
        machine_free_bytes=_kib(_text(_PROC / "meminfo"), "MemAvailable"),
        kills=kills,
    )


def _kib(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)
    return int(found[1]) << 10 if found else 0


def _text(path: Path) -> str:
    try:
        return read_regular(path, _MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
