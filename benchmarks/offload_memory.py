"""What a training process has in memory above what was there before: for benchmarks."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import torch

from harness import forget_highest, status_bytes
from holdfast.parallel.offload.stores.disk_store import DiskStore
from holdfast.trainer.step.training import Training


class Memory:
    """What is in use and resident above what was when it was made; bytes."""

    def __init__(self, device: torch.device, training: Training | None = None) -> None:
        self._device, self._training = device, training
        self._before = (self._in_use(), status_bytes("VmRSS"))
        self._highest = 0
        self._ended = threading.Event()

    def _in_use(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated()
        offloader = None if self._training is None else self._training.offloader
        store = None if offloader is None else offloader._room.store
        read = store.memory.room_bytes if isinstance(store, DiskStore) else 0
        found = _mallinfo()
        return found.uordblks + found.hblkhd + read

    def highest(self, step: Callable[[], None]) -> tuple[int, int]:
        """The highest in use and resident memory of a step."""
        forget_highest()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            in_use = torch.cuda.max_memory_allocated()
        else:
            in_use = self._sampled(step)
        return in_use - self._before[0], status_bytes("VmHWM") - self._before[1]

    def _sampled(self, step: Callable[[], None]) -> int:
        self._ended.clear()
        self._highest = 0
        thread = threading.Thread(target=self._sample)
        thread.start()
        step()
        self._ended.set()
        thread.join()
        return self._highest

    def _sample(self) -> None:
        while not self._ended.wait(0.001):
            self._highest = max(self._highest, self._in_use())


class _MallocInformation(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            [
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            ]
        )
    ]


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _MallocInformation
