"""Files that are opened when they are needed, and not all at once. Local."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MOST_OPEN = 64
"""Files of a folder that are kept open; systems allow a process some hundreds."""


class OpenFiles:
    """The open files of a folder, by name: the last that were opened."""

    def __init__(
        self, root: Path, open: Callable[[str], int], close: Callable[[int], None]
    ) -> None:
        """Start with no file open.

        Args:
            open: gives the number of the file at a path.
            close: is given such a number.
        """
        self._root, self._open, self._close = root, open, close
        self._files: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        """The number of a file. Raises OSError where it cannot be opened."""
        if name not in self._files:
            if len(self._files) >= MOST_OPEN:
                self._close(self._files.pop(next(iter(self._files))))
            self._files[name] = self._open(str(self._root / name))
        return self._files[name]

    def close(self) -> None:
        """Close all."""
        while self._files:
            self._close(self._files.popitem()[1])
