"""The journal of a conversion beside its output, so that it resumes after a kill. Local.

Every worker appends to a file of its own. A line is written only after the units in it are on the
device. The same files tell the first worker when the others are ready, wherever they run.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from holdfast.checkpoint.convert.sources import CheckedRange
from holdfast.parallel.errors import CheckpointError

FOLDER = ".convert"
PARTIAL = ".partial"


@dataclass(slots=True)
class Done:
    """The work that all workers have done so far."""

    checksums: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By number of the unit: CRC-32C, and the checksum of the output's format."""
    verified: set[int] = field(default_factory=set)
    parts: list[CheckedRange] = field(default_factory=list)
    """The read parts of zip entries that no worker has read whole."""


class ConversionJournal:
    """The journals of one conversion, as one of its workers sees them."""

    def __init__(self, partial: Path, rank: int) -> None:
        self.partial = partial
        self._folder, self._rank = partial / FOLDER, rank
        self._file: IO[str] | None = None

    def begin(self, fingerprint: Mapping[str, Any]) -> bool:
        """Make the output's folder, or resume one of the same conversion. Called by rank 0.

        Returns:
            Whether an interrupted conversion is resumed.
        """
        plan = self._folder / "plan.json"
        text = json.dumps(fingerprint, sort_keys=True)
        same = plan.is_file() and plan.read_text() == text
        if not same:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._folder.mkdir(parents=True)
        for stale in self._folder.glob("failed-*"):
            stale.unlink()
        fresh = plan.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(plan)
        return same

    def begun(self, fingerprint: Mapping[str, Any]) -> bool:
        """Whether rank 0 has made the folder for this conversion."""
        plan = self._folder / "plan.json"
        return plan.is_file() and plan.read_text() == json.dumps(fingerprint, sort_keys=True)

    def read(self) -> Done:
        """The records of all workers; a torn last line does not count."""
        done = Done()
        for path in sorted(self._folder.glob("journal-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                for unit, own, other in entry.get("written", ()):
                    done.checksums[unit] = own, other
                done.verified.update(entry.get("verified", ()))
                done.parts += [tuple(part) for part in entry.get("parts", ())]
        return done

    def record(
        self,
        written: Mapping[int, tuple[int, int]] | None = None,
        verified: Sequence[int] = (),
        parts: Sequence[CheckedRange] = (),
    ) -> None:
        """Append the work that this worker has done."""
        if self._file is None:
            path = self._folder / f"journal-{self._rank:05d}.jsonl"
            self._file = path.open("a")
            self._file.write("\n")
        lines = [(unit, *sums) for unit, sums in sorted((written or {}).items())]
        entry = {"written": lines, "verified": verified, "parts": parts}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def void(self) -> None:
        """Mark the output as wrong: the next attempt starts over."""
        (self._folder / "plan.json").unlink(missing_ok=True)

    def fail(self, message: str) -> None:
        """Tell rank 0 that this worker cannot go on."""
        (self._folder / f"failed-{self._rank:05d}").write_text(message)

    def failure(self) -> str:
        """The reason why a worker cannot go on; "" while all can."""
        for path in sorted(self._folder.glob("failed-*")):
            return path.read_text()
        return ""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the journals from the finished output."""
        self.close()
        shutil.rmtree(self._folder)


class Lock:
    """The lock that lets one conversion at a time write to a folder."""

    def __init__(self, target: Path) -> None:
        self._path = target.with_name(f".{target.name}.lock")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CheckpointError(
                f"{target} is being written by another conversion; wait for it, or name another "
                "folder"
            ) from error

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()
