"""Storages of host memory on a drive, written past the page cache from where they lie."""

from __future__ import annotations

import contextlib

from torch import Tensor

from holdfast.parallel.offload.stores.disk_file import DiskFile, DriveRequest, unreadable
from holdfast.parallel.offload.stores.reused_memory import ReusedMemory
from holdfast.parallel.offload.stores.slots import ALIGNMENT, rounded
from holdfast.parallel.offload.stores.store import StoreStatistics


class DiskStore:
    """A `Store` on a drive, for tensors of the CPU."""

    def __init__(self, file: DiskFile) -> None:
        self.file = file
        self.memory = ReusedMemory()
        self._leaving: list[DiskCopy] = []

    @property
    def fault(self) -> str:
        return self.file.fault

    def put(self, source: Tensor) -> DiskCopy | None:
        lead = source.data_ptr() % ALIGNMENT
        offset = self.file.take(lead + source.numel())
        if offset is None:
            return None
        copy = DiskCopy(self.file, self.memory, offset, lead, source)
        self._leaving.append(copy)
        return copy

    def advance(self) -> None:
        for copy in self._leaving:
            copy.advance()
        self._leaving = [copy for copy in self._leaving if copy.leaving]

    def trim(self) -> None:
        self.memory.trim()

    def statistics(self) -> StoreStatistics:
        return self.file.statistics()

    def close(self) -> None:
        self.file.close()


class DiskCopy:
    """A `StoredCopy` on a drive.

    Whole pages are transferred, as requests past the page cache must be. The first and the last
    page hold a few bytes of neighbours, which are written but never used.
    """

    def __init__(
        self, file: DiskFile, memory: ReusedMemory, offset: int, lead: int, source: Tensor
    ) -> None:
        self._file, self._memory = file, memory
        self._offset, self._lead = offset, lead
        self.nbytes = source.numel()
        self.failed: OSError | None = None
        self._source: Tensor | None = source
        self._target: Tensor | None = None
        self._region = rounded(lead + self.nbytes)
        self._transfer: DriveRequest | None = file.write(
            offset, source.data_ptr() - lead, self._region
        )

    def advance(self) -> None:
        """Note the end of the write, once it has ended."""
        if self._source is None or self._transfer is None or not self._file.done(self._transfer):
            return
        transfer, self._transfer = self._transfer, None
        try:
            self._file.wait(transfer)
        except OSError as error:
            # The traceback goes: its frames would keep tensors alive.
            self.failed = error.with_traceback(None)
            self._file.refuse(error)
        else:
            self._source = None

    @property
    def leaving(self) -> bool:
        """Whether its write is under way."""
        return self._source is not None and self.failed is None

    @property
    def source_free(self) -> bool:
        return self._source is None

    def fetch(self) -> bool:
        if self._target is None:
            self._begin_to_read()
        return True

    def take(self) -> Tensor:
        self.fetch()
        target, self._target = self._target, None
        assert target is not None
        assert self._transfer is not None
        transfer, self._transfer = self._transfer, None
        try:
            self._file.wait(transfer)
        except OSError:
            target = self._read_again()
        return target

    def _read_again(self) -> Tensor:
        """Read a second time: the cause of the failure may have passed."""
        target = self._begin_to_read()
        transfer, self._transfer = self._transfer, None
        assert transfer is not None
        self._target = None
        try:
            self._file.wait(transfer)
        except OSError as error:
            raise unreadable(self.nbytes, error) from error
        return target

    def _begin_to_read(self) -> Tensor:
        """Begin to read into memory aligned as the source was, so that kernels round alike."""
        target = self._target = self._memory.take(self._lead, self.nbytes)
        address = target.data_ptr() - self._lead
        self._transfer = self._file.read(self._offset, address, self._region)
        return target

    def release(self) -> bool:
        if self._transfer is not None:
            if not self._file.done(self._transfer):
                return False
            # These bytes are not needed any more; a later write meets the drive's trouble again.
            with contextlib.suppress(OSError):
                self._file.wait(self._transfer)
            self._transfer = None
        self._source = self._target = None
        if self._offset >= 0:
            self._file.give(self._offset)
            self._offset = -1
        return True
