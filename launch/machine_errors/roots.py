"""Where the kernel shows what it knows: the roots of its trees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MachineRoots:
    """The roots of the kernel's trees; those of another folder show another machine."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    kernel_messages: Path = Path("/dev/kmsg")

    @staticmethod
    def below(folder: Path) -> MachineRoots:
        """The trees of a machine that lie in a folder."""
        return MachineRoots(folder / "sys", folder / "proc", folder / "dev" / "kmsg")
