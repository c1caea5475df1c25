"""Files that are opened on demand, a bounded number at a time. Local."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MOST_OPEN = 64
"""The number of files kept open in a folder; systems allow a process some hundreds."""


class OpenFiles:
    """The most recently opened files of a folder, by name."""

    def __init__(
        self, root: Path, open: Callable[[str], int], close: Callable[[int], None]
    ) -> None:
        """Start with no file open.

        Args:
            open: opens the file at a path and returns its number.
            close: closes the file with a number.
        """
        self._root, self._open, self._close = root, open, close
        self._files: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        """The number of a file, opened if need be. Raises OSError if it cannot be opened."""
        if name not in self._files:
            if len(self._files) >= MOST_OPEN:
                self._close(self._files.pop(next(iter(self._files))))
            self._files[name] = self._open(str(self._root / name))
        return self._files[name]

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._close(self._files.popitem()[1])
