"""The journal of a conversion beside its output, so that it resumes after a kill. Local.

Every worker appends to a file of its own. A line is written only after the units in it are on the
device. The same files tell the first worker when the others are ready, wherever they run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from holdfast.checkpoint.convert.sources import CheckedRange
from holdfast.checkpoint.format import Checksum
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.files import create_file, is_at, open_added, open_lock, try_lock
from holdfast.parallel.reading import Count, decode_json, open_regular, read_regular

FOLDER = ".convert"
PARTIAL = ".partial"
_MOST_REASON_BYTES = 1 << 20


class _Entry(msgspec.Struct):
    """A line of a journal."""

    written: list[tuple[Count, Checksum, Checksum]]
    verified: list[Count]
    parts: list[CheckedRange]


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
        Raises:
            CheckpointError: something is there that no conversion of this user made, or a link.
        """
        _refuse_foreign(self.partial)
        plan = self._folder / "plan.json"
        text = json.dumps(fingerprint, sort_keys=True)
        same = self.begun(fingerprint)
        if not same:
            self._begin_anew()
        for stale in self._folder.glob("failed-*"):
            stale.unlink()
        fresh = plan.with_suffix(".new")
        with create_file(fresh) as file:
            file.write(text.encode())
        fresh.replace(plan)
        return same

    def _begin_anew(self) -> None:
        """Make an empty folder for the output; what an earlier conversion left there goes."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self._folder.mkdir(parents=True)

    def begun(self, fingerprint: Mapping[str, Any]) -> bool:
        """Whether rank 0 has made the folder for this conversion."""
        expected = json.dumps(fingerprint, sort_keys=True).encode()
        try:
            with open_regular(self._folder / "plan.json", follow=False) as file:
                return file.read(len(expected) + 1) == expected
        except OSError:
            return False

    def read(self) -> Done:
        """The records of all workers; a torn last line does not count."""
        done = Done()
        for path in sorted(self._folder.glob("journal-*.jsonl")):
            for line in read_regular(path, follow=False).splitlines():
                try:
                    entry = decode_json(line, _Entry)
                except ValueError:
                    continue
                for unit, own, other in entry.written:
                    done.checksums[unit] = own, other
                done.verified.update(entry.verified)
                done.parts += entry.parts
        return done

    def record(
        self,
        written: Mapping[int, tuple[int, int]] | None = None,
        verified: Sequence[int] = (),
        parts: Sequence[CheckedRange] = (),
    ) -> None:
        """Append the work that this worker has done."""
        if self._file is None:
            self._file = os.fdopen(open_added(self._path("journal", ".jsonl")), "a")
            self._file.write("\n")
        lines = [(unit, *sums) for unit, sums in sorted((written or {}).items())]
        entry = {"written": lines, "verified": verified, "parts": parts}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _path(self, name: str, suffix: str = "") -> Path:
        return self._folder / f"{name}-{self._rank:05d}{suffix}"

    def void(self) -> None:
        """Mark the output as wrong: the next attempt starts over."""
        (self._folder / "plan.json").unlink(missing_ok=True)

    def fail(self, message: str) -> None:
        """Tell rank 0 that this worker cannot go on, where the disk takes it."""
        with contextlib.suppress(OSError), create_file(self._path("failed")) as file:
            file.write(message.encode(errors="backslashreplace"))

    def failure(self) -> str:
        """The reason why a worker cannot go on; "" while all can."""
        for path in sorted(self._folder.glob("failed-*")):
            return read_regular(path, _MOST_REASON_BYTES, own=True).decode()
        return ""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the journals from the finished output."""
        self.close()
        shutil.rmtree(self._folder)


def _refuse_foreign(partial: Path) -> None:
    """Refuse an output's folder with anything in it that a conversion of this user does not make.

    A link in it would lead what is written to a file elsewhere.

    Raises:
        CheckpointError: it, or something in it, is another user's, a link or no file or folder.
    """
    if not os.path.lexists(partial):
        return
    wrong: Path | None = partial
    if _is_own(partial) and partial.is_dir():
        mark = partial / FOLDER
        if os.path.lexists(mark) and mark.is_dir():
            wrong = next((path for path in partial.rglob("*") if not _is_own(path)), None)
        elif not any(partial.iterdir()):
            wrong = None
    if wrong is not None:
        raise CheckpointError(
            f"{wrong} is in the way: no conversion of this user made it; move {partial} away"
        )


def _is_own(path: Path) -> bool:
    """Whether a path is a folder or a file of this user, which has no other name."""
    found = path.lstat()
    whole = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
    return whole and found.st_uid == os.geteuid()


def _unwritable(target: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{target} cannot be written: {error.strerror}; name a folder with room that you may write"
    )


class Lock:
    """The lock that lets one conversion at a time write to a folder."""

    def __init__(self, target: Path) -> None:
        """Take the lock.

        Raises:
            CheckpointError: another conversion has it, or no conversion of this user made that
                file.
            ConfigError: its file cannot be made.
        """
        self._path = target.with_name(f".{target.name}.lock")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(target, error) from error
        self._descriptor = -1
        while self._descriptor < 0:
            found = os.path.lexists(self._path)
            try:
                descriptor = open_lock(self._path)
            except OSError as error:
                raise _unwritable(target, error) from error
            state = os.fstat(descriptor)
            if found and (state.st_size or state.st_nlink > 1 or state.st_uid != os.geteuid()):
                os.close(descriptor)
                raise CheckpointError(
                    f"{self._path} is in the way: no conversion of this user made it; move it away"
                )
            if not try_lock(descriptor):
                os.close(descriptor)
                raise CheckpointError(
                    f"{target} is being written by another conversion; wait for it, or name "
                    "another folder"
                )
            if is_at(descriptor, self._path):  # else the one before has just removed it
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def close(self) -> None:
        """Give the lock up; its file goes, where the folder can be written."""
        with contextlib.suppress(OSError):
            if is_at(self._descriptor, self._path):
                self._path.unlink()
        os.close(self._descriptor)
