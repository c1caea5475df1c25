"""The file that keeps what a run says on the console."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from holdfast.parallel.errors import printable
from holdfast.parallel.output.appended_file import AppendedFile, Tail
from holdfast.parallel.output.disk_queue import DiskWord


class ConsoleLog:
    """What a run says, appended to a file without escapes. No method raises OSError.

    Several processes may add to it, and a signal's handler may.
    """

    def __init__(self, path: Path) -> None:
        """Make the file's folder, but not the one above. The file is opened later."""
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
        self._file = AppendedFile(path, DiskWord(), Tail.ENDED)

    def line(self, text: str) -> None:
        """Add a line with its date and time."""
        self.text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def text(self, text: str) -> None:
        """Add lines as they are."""
        self._file.append(printable(text).encode(errors="backslashreplace"))

    def close(self) -> None:
        """Write what waits, without patience for a disk that refuses; may be called again."""
        self._file.close(0.0)
