"""A log file that a full disk neither tears nor stops."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from holdfast.parallel.output.appended_file import AppendedFile, Tail
from holdfast.parallel.output.disk_queue import DiskWord


class LogFile(logging.Handler):
    """A handler that appends records to a file. A disk that refuses is told in the log itself."""

    def __init__(self, path: Path, layout: str) -> None:
        """Make the file's folder, but not the one above. The file is opened later.

        Args:
            layout: the format of a line, as for `logging.Formatter`.
        """
        super().__init__()
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
        self.setFormatter(logging.Formatter(layout))
        self._told: list[str] = []
        self._file = AppendedFile(path, DiskWord(self._told.append), Tail.ENDED)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as error:
            text = f"a message of {record.name} cannot be formatted: {error!r}"
        self._file.append(f"{text}\n".encode(errors="backslashreplace"))
        while self._told:
            self._file.append(f"{self._told.pop(0)}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        self._file.close(0.0)
        super().close()
