"""The errors of this machine since the last look: counters that have risen, and messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from holdfast.launch.machine_errors.counters import read_counts
from holdfast.launch.machine_errors.gpus import GpuState, gpu_states
from holdfast.launch.machine_errors.kernel_messages import KernelMessages
from holdfast.launch.machine_errors.kinds import MachineError
from holdfast.launch.machine_errors.roots import MachineRoots

_AGAIN_S = 60.0
"""Seconds after which errors of a kind that keep coming are told again; serious ones at once."""


class MachineErrors:
    """What has gone wrong since the watch began. Used by one thread."""

    def __init__(
        self, roots: MachineRoots | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with what the counters say now; that is no news."""
        self._roots, self._clock = roots or MachineRoots(), clock
        self._messages = KernelMessages(self._roots.kernel_messages)
        self._counts = self._read(gpu_states(by_program=False))
        self._waiting: dict[MachineError, int] = {}
        """What has not been told, as its kind was told lately."""
        self._told_s: dict[MachineError, float] = {}

    def look(self) -> list[MachineError]:
        """The errors since the last look that are to be told now."""
        gpus = gpu_states(by_program=False)  # no program is started every few seconds
        counts = self._read(gpus)
        new = [*risen(self._counts, counts), *self._messages.errors(), *_slowed(gpus)]
        self._counts = counts
        for error in new:
            of = replace(error, count=0)
            self._waiting[of] = self._waiting.get(of, 0) + error.count
        now_s = self._clock()
        due = [
            of
            for of in self._waiting
            if of.is_serious or now_s - self._told_s.get(of, -_AGAIN_S) >= _AGAIN_S
        ]
        self._told_s |= dict.fromkeys(due, now_s)
        return [replace(of, count=self._waiting.pop(of)) for of in due]

    def close(self) -> None:
        self._messages.close()

    def _read(self, gpus: Sequence[GpuState]) -> dict[MachineError, int]:
        return read_counts(self._roots) | dict(_counted(gpus))


def risen(
    before: Mapping[MachineError, int], now: Mapping[MachineError, int]
) -> list[MachineError]:
    """What has been counted between two readings. Pure.

    A counter that is new, or lower than before, belongs to a device that has come back; what it
    has counted before it was seen is no news.
    """
    return [
        replace(of, count=count - before[of])
        for of, count in now.items()
        if of in before and count > before[of]
    ]


def _counted(gpus: Sequence[GpuState]) -> Iterator[tuple[MachineError, int]]:
    """What the drivers of GPUs count."""
    for gpu in gpus:
        if gpu.uncorrectable is not None:
            what = "an error of a GPU's memory that cannot be corrected"
            of = MachineError("memory_uncorrectable", gpu.device, 0, what, is_serious=True)
            yield of, gpu.uncorrectable


def _slowed(gpus: Sequence[GpuState]) -> Iterator[MachineError]:
    """The GPUs that are slowed down at this look."""
    for gpu in gpus:
        if gpu.slowed:
            yield MachineError("throttled", gpu.device, 1, "a GPU is slowed down by heat or power")
