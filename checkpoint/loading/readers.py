"""Readers of a load's pieces: a local folder by the file engine, a URL by byte ranges."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from holdfast import _native
from holdfast.checkpoint.loading.read_plan import ReadRequest
from holdfast.parallel.errors import CheckpointError, Unreadable, in_a_line
from holdfast.parallel.reading import MOST_BYTES, open_regular, read_whole

_T = TypeVar("_T")
_REMOTE_READS = 8


class ByteReader(Protocol):
    """Reads the bytes of one checkpoint. Local."""

    def read(self, requests: Sequence[ReadRequest], address: int) -> Iterator[int]:
        """Read all requests to their offsets after `address`. Yields their numbers as they arrive.

        The memory must stay allocated until the iterator has ended, well or not.

        Raises:
            CheckpointError: a file is missing, too short or cannot be read.
        """
        ...

    def read_file(self, name: str, length: int | None = None) -> bytes:
        """A whole small file, or its first `length` bytes.

        Raises:
            CheckpointError: it cannot be read, or is larger than a small file can be.
        """
        ...

    def size(self, name: str) -> int:
        """The length of a file in bytes."""
        ...

    def close(self) -> None: ...


class FolderReader:
    """A checkpoint in a local folder.

    Reads go through the page cache. With nothing cached that is as fast as past it (measured), and
    the next reader of the same files, such as an evaluation, finds them in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._engine = _native.FileEngine(direct=False)
        self._handles: dict[str, int] = {}

    def read(self, requests: Sequence[ReadRequest], address: int) -> Iterator[int]:
        try:
            for request in requests:
                if request.file not in self._handles:
                    path = self.folder / request.file
                    open_regular(path).close()
                    self._handles[request.file] = self._engine.open(str(path))
            tickets = self._engine.submit(
                [
                    (False, self._handles[r.file], r.address(address), r.offset, r.length)
                    for r in requests
                ]
            )
            try:
                for number, ticket in enumerate(tickets):
                    self._engine.wait(ticket)
                    yield number
            finally:
                # After a failure the other reads are still in flight; their outcome no longer
                # matters.
                with contextlib.suppress(OSError):
                    self._engine.wait_all()
        except OSError as error:
            place = error.filename or self.folder
            raise _unread(error, place) from error

    def read_file(self, name: str, length: int | None = None) -> bytes:
        try:
            with open_regular(self.folder / name) as file:
                if length is None:
                    return read_whole(file, self.folder / name)
                return file.read(min(os.fstat(file.fileno()).st_size, length))
        except OSError as error:
            raise _unread(error, self.folder / name) from error

    def size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise _unread(error, self.folder / name) from error

    def close(self) -> None:
        self._engine.close()


def _unread(error: OSError, place: Path | str) -> CheckpointError:
    """The error for a file that cannot be read; a missing one is no riddle."""
    kind = CheckpointError if isinstance(error, FileNotFoundError) else Unreadable
    return kind(f"{place} cannot be read: {error.strerror or error}")


class RemoteReader:
    """A checkpoint at an fsspec URL, read by byte ranges."""

    def __init__(self, url: str, filesystem: Any, path: str) -> None:
        self.url = url
        self._filesystem, self._path = filesystem, path
        self._pool = ThreadPoolExecutor(_REMOTE_READS, thread_name_prefix="checkpoint-read")

    def read(self, requests: Sequence[ReadRequest], address: int) -> Iterator[int]:
        def fetch(request: ReadRequest) -> None:
            content = self._fetch(request.file, request.offset, request.offset + request.length)
            if len(content) != request.length:
                raise CheckpointError(
                    f"{self.url}/{request.file} ends at byte {request.offset + len(content)}, and "
                    f"bytes up to {request.offset + request.length} are needed"
                )
            ctypes.memmove(request.address(address), content, request.length)

        fetched = [self._pool.submit(fetch, request) for request in requests]
        try:
            for number, done in enumerate(fetched):
                done.result()
                yield number
        finally:
            wait(fetched)

    def read_file(self, name: str, length: int | None = None) -> bytes:
        if length is None:
            length = self.size(name)
            if length > MOST_BYTES:
                raise CheckpointError(
                    f"{self.url}/{name} cannot be read: it has {length:,} bytes, and such a file "
                    f"has at most {MOST_BYTES:,}"
                )
        return self._fetch(name, 0, length)

    def size(self, name: str) -> int:
        return self._asked(name, lambda path: self._filesystem.size(path))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fetch(self, name: str, start: int | None, end: int | None) -> bytes:
        return self._asked(name, lambda path: self._filesystem.cat_file(path, start=start, end=end))

    def _asked(self, name: str, ask: Callable[[str], _T]) -> _T:
        # Each driver has its own kinds of errors; they all mean the same here.
        try:
            return ask(f"{self._path}/{name}")
        except Exception as error:
            raise Unreadable(f"{self.url}/{name} cannot be read: {in_a_line(error)}") from error
