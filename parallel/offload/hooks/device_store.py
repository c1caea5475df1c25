"""A store that is opened for the device of the first saved tensor. Local."""

from __future__ import annotations

from pathlib import Path

import torch

from holdfast.parallel.offload.stores import (
    DiskFile,
    DiskStore,
    HostStore,
    StagedStore,
    Store,
    StoreStatistics,
)


class DeviceStore:
    """Opens a drive or host memory for one device, once its first tensor is saved."""

    def __init__(
        self, path: str | Path | None, *, limit_bytes: int, bytes_per_s: float, staging_bytes: int
    ) -> None:
        """Nothing is opened yet. The arguments are those of `Offloader`."""
        self.file: DiskFile | None = None
        if path is not None:
            self.file = DiskFile(path, limit_bytes=limit_bytes, bytes_per_s=bytes_per_s)
        self.store: Store | None = None
        self.device = torch.device("cpu")
        self.is_closed = False
        self._limit_bytes, self._staging_bytes = limit_bytes, staging_bytes

    def reaches(self, device: torch.device) -> bool:
        """Whether tensors of a device can be sent. The first device asked for is the only one."""
        if self.store is None:
            self.device = device
            if self.file is None:
                self.store = HostStore(device, limit_bytes=self._limit_bytes)
            elif device.type == "cpu":
                self.store = DiskStore(self.file)
            else:
                self.store = StagedStore(self.file, device, staging_bytes=self._staging_bytes)
        return device == self.device

    @property
    def fault(self) -> str:
        """Why the store takes less than it could; empty while all is well."""
        return "" if self.store is None else self.store.fault

    def statistics(self) -> StoreStatistics:
        """Bytes moved and time busy since the store was opened."""
        return StoreStatistics() if self.store is None else self.store.statistics()

    def busy_s(self) -> float:
        """Seconds for which the store has been busy so far."""
        return self.statistics().busy_s

    def close(self) -> None:
        """End all transfers and release the room; a second call does nothing."""
        self.is_closed = True
        if self.file is not None:
            self.file.close()
