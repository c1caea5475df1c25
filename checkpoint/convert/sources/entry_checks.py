"""Checksums of zip entries that are read in parts, combined as the parts arrive. Pure."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.checkpoint.convert.elements import ZipRecord, combine_crc32
from holdfast.parallel.errors import CheckpointError

Entries = Mapping[tuple[str, int, int], ZipRecord]
"""The zip record of each byte range (file, byte, length)."""
CheckedRange = tuple[str, int, int, int]
"""File, first byte, byte after the last, and the CRC-32 of the range."""


class DamagedEntry(CheckpointError):
    """A wrong checksum of an entry, parts of which may have been written already."""


class EntryChecks:
    """Joins adjacent parts of entries, and compares an entry once all its parts are there.

    It reads nothing itself: an entry with a part that is never read stays unchecked.
    """

    def __init__(self, root: Path, entries: Entries) -> None:
        self._root = root
        self._files: defaultdict[str, _File] = defaultdict(_File)
        for (file, start, length), entry in sorted(entries.items(), key=lambda item: item[0]):
            self._files[file].starts.append(start)
            self._files[file].entries.append((start + length, entry))

    def wants(self, file: str, start: int, stop: int) -> bool:
        """Whether a byte range of a file is part of an entry with a checksum."""
        return file in self._files and self._files[file].entry_of(start, stop) is not None

    def add(self, parts: Iterable[CheckedRange], what: str = "") -> None:
        """Add parts that have been read; a part that overlaps another does not count.

        Args:
            what: the purpose of the read, for messages.
        Raises:
            DamagedEntry: an entry became complete, and has another checksum.
        """
        for name, start, stop, crc in parts:
            if not self.wants(name, start, stop):
                continue
            found = self._files[name].join(start, stop, crc)
            if found is not None and found[0] != found[1].crc32:
                raise DamagedEntry(
                    f"{self._root / name} is damaged: its entry "
                    f"{found[1].name}{what and f' ({what})'} has "
                    f"checksum {found[0]:08x}, not {found[1].crc32:08x}"
                )

    def rest(self) -> list[CheckedRange]:
        """The ranges of entries that are not complete."""
        return [
            (name, start, *file.stretches[start])
            for name, file in self._files.items()
            for start in file.begun
        ]


@dataclass(slots=True)
class _File:
    starts: list[int] = field(default_factory=list)
    """The first byte of each entry, in order."""
    entries: list[tuple[int, ZipRecord]] = field(default_factory=list)
    """The byte after the last, and the record, of each entry."""
    begun: list[int] = field(default_factory=list)
    """The first bytes of the ranges read so far of incomplete entries, in order."""
    stretches: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By first byte: the byte after the last, and the checksum, of such a range."""

    def entry_of(self, start: int, stop: int) -> int | None:
        """The number of the entry that contains a range."""
        number = bisect.bisect_right(self.starts, start) - 1
        return number if number >= 0 and stop <= self.entries[number][0] else None

    def join(self, start: int, stop: int, crc: int) -> tuple[int, ZipRecord] | None:
        """Add a range of an entry. Returns the entry and its checksum once it is complete."""
        number = self.entry_of(start, stop)
        assert number is not None
        first, (end, entry) = self.starts[number], self.entries[number]
        at = bisect.bisect_left(self.begun, start)
        before = self.begun[at - 1] if at else -1
        after = self.begun[at] if at < len(self.begun) else end
        if after < stop or (at and self.stretches[before][0] > start):
            return None
        if before >= first and self.stretches[before][0] == start:
            crc = combine_crc32(self.stretches.pop(before)[1], crc, stop - start)
            start, at = before, at - 1
            del self.begun[at]
        if after == stop and stop < end:
            last, own = self.stretches.pop(after)
            crc = combine_crc32(crc, own, last - stop)
            stop = last
            del self.begun[at]
        if (start, stop) == (first, end):
            return crc, entry
        self.begun.insert(at, start)
        self.stretches[start] = stop, crc
        return None
