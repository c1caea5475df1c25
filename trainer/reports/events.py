"""events.jsonl: what happened in a run, written by all of its processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.parallel.output import AppendedFile, DiskWord, Tail


class EventFile:
    """The events of a run, as one process adds to them. No method raises OSError."""

    def __init__(self, path: Path, word: DiskWord | None = None) -> None:
        """Nothing is opened yet.

        Args:
            word: told when the file cannot be written; None: nothing is told.
        """
        self.word = word if word is not None else DiskWord()
        self._file = AppendedFile(path, self.word, Tail.SET_ASIDE)

    def append(self, event: str, /, **fields: Any) -> None:
        """Add one event with its fields and the time."""
        self.extend([(event, fields)])

    def extend(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Add events as one record, so that nothing comes between them."""
        now = time.time()
        lines = (json.dumps({"time": now, "event": event, **fields}) for event, fields in events)
        self._file.append("".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        """Write what waits, and tell what could not be written; may be called again."""
        self._file.close()
