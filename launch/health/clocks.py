"""The devices of a node: how many there are, and whether they run at their clock.

To be asked after the devices have worked: an idle one clocks down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from holdfast.launch.health.report import Check, failed
from holdfast.launch.machine_errors import MachineRoots, gpu_states
from holdfast.parallel.reading import read_regular

_FREQUENCY = "devices/system/cpu/cpu*/cpufreq"
_MOST_BYTES = 64


def check_clocks(roots: MachineRoots) -> list[Check]:
    """The cores and GPUs of this node, and their clocks. Local."""
    return [*_cores(roots), *_gpus()]


def _cores(roots: MachineRoots) -> Iterator[Check]:
    shares = list(_shares(roots))
    if shares:  # many virtual machines do not tell
        yield Check("clock of the cores", 100 * median(shares), "% of the highest", "least")


def _shares(roots: MachineRoots) -> Iterator[float]:
    """The present share of each core's highest frequency."""
    for folder in roots.sys.glob(_FREQUENCY):
        now, most = (_hertz(folder / f"{n}_freq") for n in ("scaling_cur", "cpuinfo_max"))
        if now and most:
            yield now / most


def _hertz(path: Path) -> float:
    """A frequency in kHz; 0 where the kernel does not tell it."""
    with contextlib.suppress(OSError, ValueError):
        return float(read_regular(path, _MOST_BYTES))
    return 0.0


def _gpus() -> Iterator[Check]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield Check("GPUs", float(count), comparison="equal")
    states = gpu_states()
    if len(states) > count and torch.version.cuda is not None:
        told = f"the driver knows {len(states)} GPUs, and {count} can be used"
        yield Check("GPUs that can be used", float(count), passed=bool(count), reason=told)
    for gpu in states:
        if gpu.clock_mhz and gpu.most_clock_mhz:
            share = 100 * gpu.clock_mhz / gpu.most_clock_mhz
            name = f"clock of {gpu.device}"
            if gpu.slowed:
                told = f"it is slowed down because of heat or power (reasons {gpu.slowed:#x})"
                yield failed(name, share, "% of the highest", told)
            else:
                yield Check(name, share, "% of the highest", "least")
        if gpu.uncorrectable is not None:
            name, number = f"memory errors of {gpu.device}", float(gpu.uncorrectable)
            told = "it has had memory errors that cannot be corrected; reset it" if number else ""
            yield Check(name, number, passed=not number, reason=told)
    for number in range(0 if states else count):
        properties = torch.cuda.get_device_properties(number)
        yield Check(f"model of cuda:{number}", properties.name, comparison="equal")
