"""Storages of a GPU on a drive, by way of a bounded, pinned part of host memory."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from time import sleep

import torch
from torch import Tensor

from holdfast.parallel.errors import OffloadError
from holdfast.parallel.offload.stores.disk_file import DiskFile, DriveRequest, unreadable
from holdfast.parallel.offload.stores.host_store import Copier, HostMemory, is_past
from holdfast.parallel.offload.stores.store import StoreStatistics

_POLL_S = 5e-5


class StagedStore:
    """A `Store` on a drive whose storages pass through staging memory.

    The staging memory is registered with the file engine. Bytes that could not be written stay in
    staging memory, so freed device memory is never needed back.
    """

    def __init__(self, file: DiskFile, device: torch.device, *, staging_bytes: int) -> None:
        self.file = file
        self.copier = Copier(device)
        self.staging = HostMemory(
            pinned=device.type == "cuda", limit_bytes=staging_bytes, growth_bytes=staging_bytes
        )
        self._registered = False
        self._moving: list[StagedCopy] = []

    @property
    def fault(self) -> str:
        return self.file.fault

    def put(self, source: Tensor) -> StagedCopy | None:
        room = self.staging.take(source.numel())
        if room is None:
            return None
        if not self._registered:
            for memory in self.staging.memory:
                self.file.engine.register_buffer(memory.data_ptr(), memory.numel())
            self._registered = True
        offset = self.file.take(source.numel())
        if offset is None:
            self.staging.give(room[1])
            return None
        copy = StagedCopy(self, offset, source, *room)
        self._moving.append(copy)
        return copy

    def begin_read(self, copy: StagedCopy, *, must: bool) -> tuple[Tensor, tuple[int, int]] | None:
        """Take staging memory for a copy that comes back, beyond the limit if `must`."""
        room = self.staging.take(copy.nbytes, beyond=must)
        if room is not None:
            self._moving.append(copy)
        return room

    def advance(self) -> None:
        for copy in self._moving:
            copy.advance()
        self._moving = [copy for copy in self._moving if copy.moving]

    def trim(self) -> None:
        """Does nothing: pinned memory is slow to allocate, so it stays."""

    def statistics(self) -> StoreStatistics:
        found = self.file.statistics()
        busy_s = max(found.busy_s, self.copier.busy_s())
        return StoreStatistics(
            found.written_bytes, found.read_bytes, busy_s, found.room_bytes, found.used_bytes
        )

    def close(self) -> None:
        self.file.close()


class _At(Enum):
    """The position of a copy on its way."""

    LEAVING = "from the device to staging"
    WRITING = "from staging to the drive"
    AWAY = "on the drive"
    STRANDED = "in staging: it could not be written"
    READING = "from the drive to staging"
    ARRIVING = "from staging to the device"
    LOST = "cannot be read"


class StagedCopy:
    """A `StoredCopy` of a `StagedStore`.

    It passes through host memory and disk in both directions, and has the fields that both need.
    """

    def __init__(
        self,
        store: StagedStore,
        offset: int,
        source: Tensor,
        piece: Tensor,
        key: tuple[int, int],
    ) -> None:
        self._store, self._offset = store, offset
        self._piece: Tensor | None = piece
        self._key = key
        self.nbytes = source.numel()
        self.failed: OSError | None = None
        """Always None: unwritable bytes stay in staging, and the file refuses later ones."""
        self._source: Tensor | None = source
        self._target: Tensor | None = None
        self._event = store.copier.out(source, piece)
        self._transfer: DriveRequest | None = None
        self._reads = 0
        self._wanted = False
        self._lost = OffloadError()
        self._at = _At.LEAVING

    def advance(self) -> None:
        if self._at is _At.LEAVING and is_past(self._event):
            self._source = None
            if self._wanted:
                self._arrive()
            else:
                self._transfer = self._request(self._store.file.write)
                self._at = _At.WRITING
        elif self._at is _At.WRITING and self._store.file.done(self._waited_for):
            self._end_write()
        elif self._at is _At.READING and self._store.file.done(self._waited_for):
            self._end_read()
        elif self._at is _At.ARRIVING and self._piece is not None and is_past(self._event):
            self._give_piece()

    @property
    def source_free(self) -> bool:
        return self._source is None

    @property
    def moving(self) -> bool:
        """Whether a transfer of this copy is under way."""
        arrived = self._at is _At.ARRIVING and self._piece is None
        return not (arrived or self._at in (_At.AWAY, _At.STRANDED, _At.LOST))

    def fetch(self) -> bool:
        return self._fetch(must=False)

    def _fetch(self, *, must: bool) -> bool:
        self._wanted = True
        if self._at is _At.STRANDED:
            self._arrive()
        elif self._at is _At.AWAY:
            room = self._store.begin_read(self, must=must)
            if room is None:
                return False
            self._piece, self._key = room
            self._transfer = self._request(self._store.file.read)
            self._at = _At.READING
        return True

    def take(self) -> Tensor:
        self._fetch(must=True)
        while self._at is not _At.ARRIVING:
            self._store.advance()
            if self._at is _At.LOST:
                raise self._lost
            if self._at is not _At.ARRIVING:
                sleep(_POLL_S)
        target, self._target = self._target, None
        assert target is not None
        self._store.copier.arrive(target, self._event)
        return target

    def release(self) -> bool:
        self._wanted = False
        if self._at in (_At.WRITING, _At.READING):
            if not self._store.file.done(self._waited_for):
                return False
            try:
                self._store.file.wait(self._waited_for)
            except OSError as error:
                self._store.file.refuse(error)
        elif not is_past(self._event):
            return False
        self._at, self._source, self._target = _At.AWAY, None, None
        self._give_piece()
        if self._offset >= 0:
            self._store.file.give(self._offset)
            self._offset = -1
        return True

    @property
    def _waited_for(self) -> DriveRequest:
        assert self._transfer is not None
        return self._transfer

    def _request(self, begin: Callable[[int, int, int], DriveRequest]) -> DriveRequest:
        assert self._piece is not None
        return begin(self._offset, self._piece.data_ptr(), self.nbytes)

    def _end_write(self) -> None:
        try:
            self._store.file.wait(self._waited_for)
        except OSError as error:
            self._store.file.refuse(error)
            self._at = _At.STRANDED
        else:
            self._at = _At.AWAY
        if self._wanted:
            self._arrive()
        elif self._at is _At.AWAY:
            self._give_piece()

    def _end_read(self) -> None:
        try:
            self._store.file.wait(self._waited_for)
        except OSError as error:
            self._reads += 1
            if self._reads > 1:
                self._lost, self._at = unreadable(self.nbytes, error), _At.LOST
            else:
                self._transfer = self._request(self._store.file.read)
        else:
            self._arrive()

    def _arrive(self) -> None:
        assert self._piece is not None
        self._target, self._event = self._store.copier.back(self._piece)
        self._at = _At.ARRIVING

    def _give_piece(self) -> None:
        if self._piece is not None:
            self._store.staging.give(self._key)
            self._piece = None
