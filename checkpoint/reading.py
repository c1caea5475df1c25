"""Reading the chunks of a load: from a local folder through the file engine, or by ranges of a remote one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from holdfast import _native
from holdfast.checkpoint.read_plan import Request
from holdfast.parallel.errors import CheckpointError

_T = TypeVar("_T")
_REMOTE_READS = 8


class ByteReader(Protocol):
    """Where a checkpoint's bytes come from. Local."""

    def read(self, requests: Sequence[Request], address: int) -> None:
        """Bring all requests to their places after `address`.

        Raises:
            CheckpointError: a file is missing, too short or cannot be read.
        """
        ...

    def read_file(self, name: str, length: int | None = None) -> bytes:
        """A whole small file, or the first `length` bytes of one."""
        ...

    def size(self, name: str) -> int:
        """A file's length in bytes."""
        ...

    def close(self) -> None: ...


class FolderReader:
    """A checkpoint in a local folder.

    What the page cache has is read from there; the rest directly, so that loading evicts nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cached = _native.FileEngine(direct=False)
        self._direct = _native.FileEngine()
        self._handles: dict[tuple[bool, str], int] = {}

    def read(self, requests: Sequence[Request], address: int) -> None:
        waiting = []
        try:
            for request in requests:
                in_memory = self._in_page_cache(request)
                engine = self._cached if in_memory else self._direct
                handle = self._handle(engine, in_memory, request.file)
                place = address + request.place
                ticket = engine.read(handle, place, request.offset, request.length)
                waiting.append((engine, ticket))
            while waiting:
                engine, ticket = waiting.pop(0)
                engine.wait(ticket)
        except OSError as error:
            self._let_go(waiting)
            place = error.filename or self.folder
            raise CheckpointError(f"{place} cannot be read: {error.strerror or error}") from error

    def read_file(self, name: str, length: int | None = None) -> bytes:
        try:
            with (self.folder / name).open("rb") as file:
                return file.read(-1 if length is None else length)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / name} cannot be read: {error.strerror}"
            ) from error

    def size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / name} cannot be read: {error.strerror}"
            ) from error

    def close(self) -> None:
        self._cached.close()
        self._direct.close()

    def _handle(self, engine: _native.FileEngine, cached: bool, file: str) -> int:
        key = (cached, file)
        if key not in self._handles:
            self._handles[key] = engine.open(str(self.folder / file))
        return self._handles[key]

    def _in_page_cache(self, request: Request) -> bool:
        """Whether the first page of a request can be had without the device."""
        handle = os.open(self.folder / request.file, os.O_RDONLY)
        try:
            probe = bytearray(min(4096, request.length))
            return os.preadv(handle, [probe], request.offset, os.RWF_NOWAIT) == len(probe)
        except (BlockingIOError, OSError):
            return False
        finally:
            os.close(handle)

    @staticmethod
    def _let_go(waiting: Sequence[tuple[_native.FileEngine, int]]) -> None:
        """Wait for what is still in flight: its memory is about to be given up."""
        for engine, ticket in waiting:
            try:
                engine.wait(ticket)
            except OSError:
                continue


class RemoteReader:
    """A checkpoint at an fsspec URL, read by byte ranges."""

    def __init__(self, url: str, filesystem: Any, path: str) -> None:
        self.url = url
        self._filesystem, self._path = filesystem, path
        self._pool = ThreadPoolExecutor(_REMOTE_READS, thread_name_prefix="checkpoint-read")

    def read(self, requests: Sequence[Request], address: int) -> None:
        def fetch(request: Request) -> None:
            content = self._fetch(request.file, request.offset, request.offset + request.length)
            if len(content) != request.length:
                raise CheckpointError(
                    f"{self.url}/{request.file} ends at byte {request.offset + len(content)}, and bytes up "
                    f"to {request.offset + request.length} are needed"
                )
            ctypes.memmove(address + request.place, content, request.length)

        for done in [self._pool.submit(fetch, request) for request in requests]:
            done.result()

    def read_file(self, name: str, length: int | None = None) -> bytes:
        return self._fetch(name, None if length is None else 0, length)

    def size(self, name: str) -> int:
        return self._asked(name, lambda path: self._filesystem.size(path))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fetch(self, name: str, start: int | None, end: int | None) -> bytes:
        return self._asked(name, lambda path: self._filesystem.cat_file(path, start=start, end=end))

    def _asked(self, name: str, ask: Callable[[str], _T]) -> _T:
        # Whatever a driver raises (each has its own kinds) means the same here.
        try:
            return ask(f"{self._path}/{name}")
        except Exception as error:
            raise CheckpointError(
                f"{self.url}/{name} cannot be read: {type(error).__name__}: {error}"
            ) from error
