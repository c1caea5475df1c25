"""The conversion engine: units are read, assembled, checked and written, several at a time.

Local.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from holdfast import _native
from holdfast.checkpoint.convert.elements import (
    UNIT_BYTES,
    Bits,
    BlockScales,
    Checksum,
    GrowingMemory,
    Location,
    Region,
    SourcePiece,
    Unit,
    bits,
    combine,
    region_of,
    strided,
)
from holdfast.checkpoint.convert.sources.entry_checks import EntryChecks
from holdfast.checkpoint.convert.sources.open_files import OpenFiles
from holdfast.checkpoint.convert.sources.source_files import (
    Memory,
    SourceFiles,
    Ticket,
    is_long,
    room_of,
)
from holdfast.checkpoint.format import ALIGNMENT, ELEMENT_BYTES
from holdfast.checkpoint.stores import open_written
from holdfast.parallel.errors import CheckpointError

FEWEST_SLOTS, MOST_SLOTS = 2, 8
SLOT_BYTES = 4 * UNIT_BYTES
"""The most bytes of a unit and its parts, unless one row of it is larger."""

Checks = Mapping[tuple[str, int, int], int]
"""CRC-32C of byte ranges (file, byte, length) of the source."""


@dataclass(frozen=True, slots=True)
class _Term:
    """The read of one location of a piece."""

    location: Location
    region: Region
    memory: Memory
    """uint8[region.bytes]."""
    in_place: bool
    """Whether it lies in the unit already."""


@dataclass(slots=True)
class _Slot:
    """A unit under way."""

    output: GrowingMemory = field(default_factory=GrowingMemory)
    scratch: GrowingMemory = field(default_factory=GrowingMemory)
    index: int = 0
    unit: Unit | None = None
    memory: Memory | None = None
    """uint8: the unit as it will be written."""
    pieces: list[tuple[SourcePiece, list[_Term]]] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)


class Engine:
    """Converts units. One thread makes and uses it."""

    def __init__(
        self,
        source: Path,
        target: Path | None,
        *,
        checksum: Checksum = "crc32c",
        memory_bytes: int = 256 << 20,
        checks: Checks | None = None,
        entries: EntryChecks | None = None,
        scales: BlockScales | None = None,
    ) -> None:
        """Open the file engines.

        Args:
            source: the folder that the locations of units are relative to.
            target: the folder that units are written to, with files of full length. None: only
                read.
            memory_bytes: the memory for units under way.
            checks: checksums of the source; a read of exactly such a range is checked.
            entries: checks of the entries of zip archives; they get everything that is read.
            scales: the scales of 8-bit elements that become wider.
        """
        self.source, self.target = source, target
        self._checksum: Checksum = checksum
        self._checks = checks or {}
        self._entries = entries or EntryChecks(source, {})
        self._scales = scales or BlockScales()
        self._slots = max(FEWEST_SLOTS, min(MOST_SLOTS, memory_bytes // SLOT_BYTES))
        with ExitStack() as opened:
            self._reads = SourceFiles(source)
            opened.callback(self._reads.close)
            self._writes = opened.enter_context(_native.FileEngine())
            self._closing = opened.pop_all()
        self._targets = OpenFiles(
            target or source,
            self._open_target,
            self._writes.close_file,
        )

    def _open_target(self, path: str) -> int:
        open_written(Path(path)).close()
        return self._writes.open(path, write=True)

    def close(self) -> None:
        """Wait for the transfers under way and close all files."""
        self._closing.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def convert(
        self,
        units: Iterable[tuple[int, Unit]],
        done: Callable[[int, Unit, Sums], None],
    ) -> None:
        """Convert units.

        Args:
            units: the units with their numbers.
            done: called with (number, unit, checksums) after a unit has been written, in any order.
        Raises:
            CheckpointError: the source cannot be read, is damaged or contradicts itself, or the
                target cannot be written.
        """
        free = [_Slot() for _ in range(self._slots)]
        reading: deque[_Slot] = deque()
        writing: deque[tuple[_Slot, int, Sums]] = deque()

        def finish_write() -> None:
            slot, ticket, sums = writing.popleft()
            assert slot.unit is not None
            self._wait_write(ticket)
            done(slot.index, slot.unit, sums)
            free.append(slot)

        def finish_read() -> None:
            slot = reading.popleft()
            sums = self._assemble(slot)
            writing.append((slot, self._write(slot), sums))

        try:
            for index, unit in units:
                while not free:
                    (finish_write if writing else finish_read)()
                slot = free.pop()
                slot.index, slot.unit = index, unit
                self._start(slot, unit)
                reading.append(slot)
                if 2 * len(reading) > self._slots:
                    finish_read()
            while reading:
                finish_read()
            while writing:
                finish_write()
        finally:
            self._drain()

    def content(self, unit: Unit) -> bytes:
        """The bytes of a unit as they would be written."""
        slot = _Slot(unit=unit)
        self._start(slot, unit)
        self._assemble(slot)
        assert slot.memory is not None
        return slot.memory.tobytes()

    def _start(self, slot: _Slot, unit: Unit) -> None:
        """Begin all reads that a unit needs."""
        misalignment = unit.offset % ALIGNMENT
        if misalignment % ELEMENT_BYTES[unit.dtype]:
            misalignment = 0
        slot.memory = slot.output.take(unit.bytes, misalignment)
        size = unit.tensor.element_bytes
        planned: list[tuple[SourcePiece, list[tuple[Location, Region]]]] = []
        total = 0
        for piece in unit.tensor.within(unit.box):
            found = [
                (location, region_of(location, piece.box.shape, size, SLOT_BYTES))
                for location in piece.locations
            ]
            planned.append((piece, found))
            total += sum(room_of(location, region)[0] for location, region in found)
        scratch = slot.scratch.take(total)
        slot.pieces, used = [], 0
        for piece, found in planned:
            inside = self._place_in_unit(slot, unit, piece, found)
            terms = []
            for location, region in found:
                memory = inside
                # Past the page cache, memory and file must be equally far from the beginning of a
                # block.
                if memory is None or (
                    is_long(region) and (memory.ctypes.data - location.offset) % ALIGNMENT
                ):
                    room, before = room_of(location, region)
                    memory = scratch[used + before : used + before + region.bytes]
                    used += room
                self._reads.want(location, region, memory, roomy=memory is not inside)
                terms.append(_Term(location, region, memory, memory is inside))
            slot.pieces.append((piece, terms))
        slot.tickets = self._reads.begin()

    def _place_in_unit(
        self, slot: _Slot, unit: Unit, piece: SourcePiece, found: Sequence[tuple[Location, Region]]
    ) -> Memory | None:
        """The bytes of the unit that a piece is read into directly, if it needs no change."""
        if len(found) != 1 or unit.dtype != unit.tensor.dtype or slot.memory is None:
            return None
        inside = piece.box.relative_to(unit.box)
        # Dimensions of extent 1 before the first cut one do not matter.
        outer = next((d for d, n in enumerate(unit.box.shape) if n > 1), 0)
        if (
            inside.start[outer + 1 :] != (0,) * len(inside.start[outer + 1 :])
            or inside.shape[outer + 1 :] != unit.box.shape[outer + 1 :]
        ):
            return None
        region = found[0][1]
        if not region.is_row_major(piece.box.shape):
            return None
        row = unit.bytes // unit.box.shape[outer] if unit.box.shape else 0
        start = inside.start[outer] * row if inside.start else 0
        return slot.memory[start : start + region.bytes]

    def _assemble(self, slot: _Slot) -> Sums:
        """Wait for the parts of a unit and assemble it. Returns the unit's checksums."""
        unit, memory = slot.unit, slot.memory
        assert unit is not None
        assert memory is not None
        self._reads.wait(slot.tickets)
        slot.tickets = []
        whole = bits(memory, unit.dtype).reshape(unit.box.shape)
        for piece, terms in slot.pieces:
            inside = piece.box.relative_to(unit.box).slices
            if not terms:
                whole[inside] = 0
                continue
            for term in terms:
                self._check(unit, term)
            if terms[0].in_place:
                continue
            values = [self._view(unit, piece, term) for term in terms]
            if unit.tensor.combine == "equal":
                self._compare(unit, piece, terms, values)
                whole[inside] = self._scales.cast(
                    values[0], unit.tensor.dtype, unit.dtype, terms[0].location
                )
            else:
                mean = unit.tensor.combine == "mean"
                whole[inside] = combine(values, unit.tensor.dtype, unit.dtype, mean=mean)
        return sums_of(memory, self._checksum)

    def _view(self, unit: Unit, piece: SourcePiece, term: _Term) -> Bits:
        return strided(bits(term.memory, unit.tensor.dtype), piece.box.shape, term.region.strides)

    def _check(self, unit: Unit, term: _Term) -> None:
        file, region = term.location.file, term.region
        parts = [
            (file, at, at + length, zlib.crc32(term.memory[into : into + length].data))
            for at, into, length in region.requests
            if self._entries.wants(file, at, at + length)
        ]
        self._entries.add(parts, unit.tensor.full_name)
        if len(region.requests) != 1:
            return
        [(offset, _, length)] = region.requests
        wanted = self._checks.get((file, offset, length))
        if wanted is not None:
            found = _native.crc32c(term.memory.ctypes.data, length)
            if found != wanted:
                raise CheckpointError(
                    f"{self.source / file} is damaged: {unit.tensor.full_name} at byte {offset} "
                    f"has checksum {found:08x}, not {wanted:08x}"
                )

    def _compare(
        self, unit: Unit, piece: SourcePiece, terms: Sequence[_Term], values: Sequence[Bits]
    ) -> None:
        for term, value in zip(terms[1:], values[1:], strict=True):
            if not np.array_equal(values[0], value):
                differing = int((values[0] != value).sum())
                raise CheckpointError(
                    f"{unit.tensor.full_name}{piece.box}: {self.source / terms[0].location.file} "
                    "and "
                    f"{self.source / term.location.file} hold copies of it that differ in "
                    f"{differing} of {value.size} elements; a copy is of another step, or damaged"
                )

    def _write(self, slot: _Slot) -> int:
        unit, memory = slot.unit, slot.memory
        assert unit is not None
        assert memory is not None
        assert self.target is not None
        try:
            file = self._targets[unit.file]
            return self._writes.write(file, memory.ctypes.data, unit.offset, unit.bytes)
        except OSError as error:
            raise self._failure(error) from error

    def _wait_write(self, ticket: int) -> None:
        try:
            self._writes.wait(ticket)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{error.filename or self.target} cannot be written: {error.strerror or error}"
        )

    def _drain(self) -> None:
        """After a failure, wait for all transfers in flight: the memory must outlive them."""
        self._reads.drain()
        with suppress(OSError):
            self._writes.wait_all()


Sums = tuple[int, int]
"""CRC-32C of a unit, for reading it back, and the checksum of the output's format (0 if equal)."""


def sums_of(memory: Memory, kind: Checksum) -> Sums:
    """The checksums of contiguous memory."""
    own = _native.crc32c(memory.ctypes.data, memory.size)
    if kind == "crc32c":
        return own, 0
    return own, zlib.crc32(memory.data)
