"""The files of a source: long byte ranges are read past the page cache, short ones through it.

Local.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from holdfast import _native
from holdfast.checkpoint.convert.elements import Location, Region
from holdfast.checkpoint.convert.sources.open_files import MOST_OPEN
from holdfast.checkpoint.format import ALIGNMENT
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import open_regular

LONG_BYTES = 64 << 10
"""Shorter ranges are read through the page cache, and so are ranges with gaps: other pieces need
the bytes in the gaps."""


Memory = NDArray[np.uint8]
Ticket = tuple[_native.FileEngine, int]
_Request = tuple[bool, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _File:
    bytes: int
    cached: int
    direct: int


class SourceFiles:
    """The files of a folder. One thread makes and uses it.

    Reads are collected and begun together.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with ExitStack() as opened:
            self._cached = opened.enter_context(_native.FileEngine(direct=False))
            self._direct = opened.enter_context(_native.FileEngine())
            self._closing = opened.pop_all()
        self._files: dict[str, _File] = {}
        self._requests: tuple[list[_Request], list[_Request]] = ([], [])

    def close(self) -> None:
        """Wait for the reads under way and close all files."""
        self._closing.close()

    def want(self, location: Location, region: Region, memory: Memory, *, roomy: bool) -> None:
        """Ask for a region; `begin` starts the read.

        Args:
            memory: uint8[region.bytes]; written until its ticket has been waited for.
            roomy: whether the block before it and the block after it may be written too.
        Raises:
            CheckpointError: the file cannot be opened.
        """
        file = self._open(location.file)
        cached, direct = self._requests
        address = memory.ctypes.data
        if not is_long(region) or (address - location.offset) % ALIGNMENT:
            cached += [
                (False, file.cached, address + into, at, length)
                for at, into, length in region.requests
            ]
            return
        start, end = location.offset, location.offset + region.bytes
        if roomy:
            before = start % ALIGNMENT
            start, address = start - before, address - before
            end = max(end, min(file.bytes, -(-end // ALIGNMENT) * ALIGNMENT))
        direct.append((False, file.direct, address, start, end - start))

    def begin(self) -> list[Ticket]:
        """Begin the reads that were asked for. Returns their tickets."""
        cached, direct = self._requests
        self._requests = ([], [])
        tickets = [(self._direct, ticket) for ticket in self._direct.submit(direct)]
        tickets += [(self._cached, ticket) for ticket in self._cached.submit(cached)]
        while len(self._files) > MOST_OPEN:
            oldest = self._files.pop(next(iter(self._files)))
            self._cached.close_file(oldest.cached)
            self._direct.close_file(oldest.direct)
        return tickets

    def wait(self, tickets: list[Ticket]) -> None:
        """Wait until all these reads have ended.

        Raises:
            CheckpointError: a read failed.
        """
        try:
            for engine, ticket in tickets:
                engine.wait(ticket)
        except OSError as error:
            raise self._failure(error) from error

    def drain(self) -> None:
        """After a failure, wait for all other reads: the memory must outlive them."""
        for engine in (self._cached, self._direct):
            try:
                engine.wait_all()
            except OSError:
                continue

    def _open(self, name: str) -> _File:
        if name not in self._files:
            path = self.root / name
            try:
                open_regular(path).close()
                cached, direct = self._cached.open(str(path)), self._direct.open(str(path))
                self._files[name] = _File(path.stat().st_size, cached, direct)
            except OSError as error:
                raise self._failure(error) from error
        return self._files[name]

    def _failure(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{error.filename or self.root} cannot be read: {error.strerror or error}"
        )


def is_long(region: Region) -> bool:
    """Whether a region is one long range without gaps, worth a read past the page cache."""
    return len(region.requests) == 1 and region.dense and region.bytes >= LONG_BYTES


def room_of(location: Location, region: Region) -> tuple[int, int]:
    """The aligned memory of a read past the page cache: (bytes, first byte of the region)."""
    before = location.offset % ALIGNMENT if is_long(region) else 0
    return -(-(before + region.bytes) // ALIGNMENT) * ALIGNMENT, before
