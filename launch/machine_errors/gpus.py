"""What the driver of NVIDIA's GPUs knows of each: clocks, temperature limits, errors of memory.

It is asked through NVML, where `nvidia-ml-py` is installed; else by its own program, nvidia-smi.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_ANSWER_S = 20.0
"""A driver whose GPU is broken may not answer."""
_SLOWED = 0x08 | 0x20 | 0x40 | 0x80
"""The reasons for lower clocks that tell of trouble: hardware slowdown, software and hardware
thermal slowdown, power brake (NVML's nvmlClocksEventReasons)."""
_QUERY = (
    "index,name,driver_version,clocks.sm,clocks.max.sm,clocks_throttle_reasons.active,"
    "ecc.errors.uncorrected.volatile.total"
)


@dataclass(frozen=True, slots=True)
class GpuState:
    """What is known of a GPU now; None: its driver does not tell."""

    index: int
    name: str
    driver: str
    clock_mhz: float | None = None
    most_clock_mhz: float | None = None
    slowed: int | None = None
    """The reasons that keep its clock low because of heat or power, as NVML's bits."""
    uncorrectable: int | None = None
    """The errors of its memory that could not be corrected, since the driver was loaded."""

    @property
    def device(self) -> str:
        return f"cuda:{self.index}"


def gpu_states(*, by_program: bool = True) -> list[GpuState]:
    """The GPUs of this machine; none where their driver cannot be asked.

    Args:
        by_program: whether nvidia-smi may be started where NVML's module is not installed.
    """
    try:
        pynvml = import_module("pynvml")
    except ImportError:
        return list(_by_program()) if by_program else []
    try:
        pynvml.nvmlInit()
    except Exception:  # of many kinds: no driver, no GPU, another version
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return [_by_nvml(pynvml, n, driver) for n in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # a GPU that is gone
        return []
    finally:
        pynvml.nvmlShutdown()


def _by_nvml(nvml: Any, index: int, driver: str) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def told(ask: Callable[[], int]) -> int | None:
        try:
            return int(ask())
        except Exception:  # this GPU has no such number
            return None

    reasons = told(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return GpuState(
        index,
        _text(nvml.nvmlDeviceGetName(handle)),
        driver,
        told(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        told(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        None if reasons is None else reasons & _SLOWED,
        told(lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile)),
    )


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _by_program() -> Iterator[GpuState]:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return
    for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True):
        if len(row) == len(_QUERY.split(",")) and row[0].isdecimal():
            index, name, driver, clock, most, reasons, uncorrectable = row
            bits = _number(reasons)
            yield GpuState(
                int(index),
                name,
                driver,
                _number(clock),
                _number(most),
                None if bits is None else bits & _SLOWED,
                _number(uncorrectable),
            )


def _number(text: str) -> int | None:
    """A number, decimal or hexadecimal; None where the program has none, as in "[N/A]"."""
    try:
        return int(text, 0)
    except ValueError:
        return None
