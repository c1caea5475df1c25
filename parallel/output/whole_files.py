"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from holdfast.parallel.files import create_file
from holdfast.parallel.output.disk_queue import DiskQueue, DiskWord


def write_whole(path: Path, content: bytes) -> None:
    """Write a file through a partial one, of which nothing is left in any case.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with create_file(partial) as file:
            file.write(content)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


class WholeFiles:
    """Writes whole files of a run. No method raises OSError; what the disk refuses waits."""

    def __init__(self, folder: Path, word: DiskWord) -> None:
        """Nothing waits.

        Args:
            folder: the folder of all files, for messages.
        """
        self.folder = folder
        self._queue = DiskQueue(str(folder), _write, lambda file: len(file[1]), word)

    def put(self, path: Path, content: bytes) -> None:
        """Write a file, now or when the disk takes it."""
        self._queue.put((path, content))

    @property
    def wait(self) -> bool:
        """Whether files wait for the disk."""
        return self._queue.waits

    def flush(self, patience_s: float) -> bool:
        """Write what waits, with attempts for this time. Returns whether nothing waits any more."""
        return self._queue.flush(patience_s)

    def forget(self) -> None:
        """Forget what waits."""
        self._queue.forget()

    def close(self, patience_s: float = 1.0) -> None:
        """Write what waits, and tell what could not be written."""
        self._queue.close(patience_s)


def _write(files: Sequence[tuple[Path, bytes]]) -> tuple[int, OSError | None]:
    for done, (path, content) in enumerate(files):
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            return done, error
    return len(files), None
