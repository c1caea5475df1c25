"""One worker's share of a conversion: write its units, and read written ones back meanwhile.

Local.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from holdfast import _native
from holdfast.checkpoint.convert.elements import Output, Unit, region_of
from holdfast.checkpoint.convert.sources import (
    SLOT_BYTES,
    Catalog,
    DamagedEntry,
    Engine,
    EntryChecks,
    Sums,
)
from holdfast.checkpoint.convert.work.journal import ConversionJournal, Done
from holdfast.checkpoint.convert.work.request import PreparedConversion
from holdfast.checkpoint.convert.work.write_verifier import MEMORY_BYTES, WriteVerifier
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import open_regular

UNITS_IN_A_ROW = 8
"""Neighbouring units go to the same worker, so that files are written in long stretches."""
RECORD_BYTES = 32 << 20
"""Bytes written between two lines of a worker's journal. A kill costs two such groups at most, plus
the work under way."""
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a conversion that a worker does, and its memory."""

    rank: int
    world: int
    memory_bytes: int
    """The memory for tensors under way in this worker."""

    def of(self, count: int) -> list[int]:
        """The numbers of this worker's units, out of `count`."""
        return [i for i in range(count) if i // UNITS_IN_A_ROW % self.world == self.rank]


def do_share(
    prepared: PreparedConversion,
    journal: ConversionJournal,
    done: Done,
    share: Share,
    progress: Callable[[int], None],
) -> None:
    """Do the rest of one worker's share.

    Args:
        done: the work that was recorded before it began.
        progress: called with a number of bytes that were written, or found written.
    Raises:
        CheckpointError: the source is damaged or contradicts itself, or the output cannot be
            written.
        DamagedEntry: the source is damaged, and the next attempt starts over.
    """
    catalog, output = prepared.catalog, prepared.output
    mine = share.of(len(output.units))
    _check_source(catalog, output, share)
    open_units = [(i, output.units[i]) for i in mine if i not in done.checksums]
    progress(sum(output.units[i].bytes for i in mine if i in done.checksums))
    pending: dict[int, Sums] = {}
    waiting_bytes = 0
    unseen = {i: done.checksums[i] for i in mine if i in done.checksums and i not in done.verified}
    entries = EntryChecks(catalog.root, catalog.records)
    try:
        with (
            WriteVerifier(journal.partial, output, journal) as verifier,
            Engine(
                catalog.root,
                journal.partial,
                checksum=output.checksum,
                memory_bytes=max(0, share.memory_bytes - MEMORY_BYTES),
                checks=catalog.checks,
                entries=entries,
                scales=catalog.scales,
            ) as engine,
        ):

            def finished(number: int, unit: Unit, sums: Sums) -> None:
                nonlocal waiting_bytes
                pending[number] = sums
                waiting_bytes += unit.bytes
                progress(unit.bytes)
                if waiting_bytes >= RECORD_BYTES:
                    verifier.add(pending)
                    pending.clear()
                    waiting_bytes = 0

            verifier.add(unseen, recorded=True)
            engine.convert(open_units, finished)
            verifier.add(pending)
            verifier.finish()
    except DamagedEntry:
        # Other units may have used the damaged entry, and are recorded as done.
        journal.void()
        raise
    journal.record(verified=[*unseen, *(i for i, _ in open_units)], parts=entries.rest())


def _check_source(catalog: Catalog, output: Output, share: Share) -> None:
    """Check this worker's share of the source's checksums that reading units does not check."""
    if not catalog.checks:
        return
    unread = sorted(_named(catalog, output) - _read_whole(output))
    for file, offset, length in unread[share.rank :: share.world]:
        crc = 0
        with open_regular(catalog.root / file) as opened:
            for position in range(offset, offset + length, _READ_BYTES):
                count = min(_READ_BYTES, offset + length - position)
                part = np.frombuffer(
                    bytearray(os.pread(opened.fileno(), count, position)), np.uint8
                )
                crc = _native.crc32c(part.ctypes.data, part.size, crc)
        if crc != catalog.checks[file, offset, length]:
            raise CheckpointError(
                f"{catalog.root / file} is damaged: the piece at byte {offset} has checksum "
                f"{crc:08x}, not {catalog.checks[file, offset, length]:08x}"
            )


def _named(catalog: Catalog, output: Output) -> set[tuple[str, int, int]]:
    """The byte ranges with checksums (file, byte, length) that tensors of the output begin in."""
    starts = {(file, offset): (file, offset, length) for file, offset, length in catalog.checks}
    return {
        starts[location.file, location.offset]
        for tensor, _ in output.expected
        for piece in tensor.pieces
        for location in piece.locations
        if (location.file, location.offset) in starts
    }


def _read_whole(output: Output) -> set[tuple[str, int, int]]:
    """The byte ranges that units read in one request, and so check if they have a checksum."""
    found: set[tuple[str, int, int]] = set()
    for unit in output.units:
        size = unit.tensor.element_bytes
        for piece in unit.tensor.within(unit.box):
            for location in piece.locations:
                region = region_of(location, piece.box.shape, size, SLOT_BYTES)
                if len(region.requests) == 1:
                    [(offset, _, length)] = region.requests
                    found.add((location.file, offset, length))
    return found
