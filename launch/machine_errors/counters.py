"""The kernel's counters of errors, as they are now. Local; reads small files of the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from holdfast.launch.machine_errors.kinds import COUNTERS, MachineError
from holdfast.launch.machine_errors.roots import MachineRoots
from holdfast.parallel.reading import read_regular

_MOST_BYTES = 1 << 16
_POISONED = MachineError(
    "memory_uncorrectable",
    "memory",
    0,
    "the kernel has taken broken pages of memory away (KiB)",
    is_serious=True,
)
_PRESSED = MachineError(
    "memory_pressure", "memory", 0, "seconds in which all processes waited for memory"
)


def read_counts(roots: MachineRoots) -> dict[MachineError, int]:
    """By kind and device, with a count of 0: how many errors there have been since the boot."""
    found: dict[MachineError, int] = {}
    for counter in COUNTERS:
        for path in roots.sys.glob(counter.pattern):
            device = path.relative_to(roots.sys).parts[counter.device]
            if _is_virtual(counter.pattern, path, roots):
                continue
            if (count := _count_in(path)) is not None:
                of = MachineError(counter.kind, device, 0, counter.what, counter.is_serious)
                found[of] = found.get(of, 0) + count
    poisoned = _numbers_in(roots.proc / "meminfo").get("HardwareCorrupted:")
    if poisoned is not None:
        found[_POISONED] = int(poisoned)
    for line in _lines_in(roots.proc / "pressure" / "memory"):
        if line.startswith("full "):
            found[_PRESSED] = int(line.rpartition("total=")[2]) // 1_000_000
    return found


def _is_virtual(pattern: str, path: Path, roots: MachineRoots) -> bool:
    """Whether a counter is that of a network interface without hardware: those come and go."""
    interface = Path(*path.relative_to(roots.sys).parts[:3])
    return pattern.startswith("class/net/") and not (roots.sys / interface / "device").exists()


def _count_in(path: Path) -> int | None:
    """The number in a counter's file: decimal or hexadecimal, or the total of a table."""
    lines = _lines_in(path)
    totals = [line.split()[-1] for line in lines if line.startswith("TOTAL_")]
    text = next(iter([*totals, *lines]), "")
    try:
        return int(text, 0)
    except ValueError:
        return None


def _numbers_in(path: Path) -> Mapping[str, str]:
    """The first value of each line, by its name."""
    words = (line.split() for line in _lines_in(path))
    return {found[0]: found[1] for found in words if len(found) > 1}


def _lines_in(path: Path) -> list[str]:
    """The lines of a file of the kernel; none if it cannot be read."""
    try:
        return list(_stripped(read_regular(path, _MOST_BYTES).decode(errors="replace")))
    except OSError:
        return []


def _stripped(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if line.strip())
