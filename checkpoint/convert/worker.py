"""One worker's share of a conversion: write its units, and read back what is on the disk meanwhile. Local."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from holdfast import _native
from holdfast.checkpoint.convert.catalog import Catalog
from holdfast.checkpoint.convert.engine import SLOT_BYTES, Engine, Sums
from holdfast.checkpoint.convert.journal import Done, Journal
from holdfast.checkpoint.convert.output import UNIT_BYTES, Output, Unit
from holdfast.checkpoint.convert.regions import region_of
from holdfast.parallel.errors import CheckpointError

UNITS_IN_A_ROW = 8
"""Neighbouring units go to the same worker, so that files are written in long stretches."""
RECORD_BYTES = 128 << 20
"""What a kill may cost a worker: that much is written between two lines of its journal."""
_READ_BYTES = 8 << 20
_READ_BACK_BYTES = 4 * (UNIT_BYTES + 8192)
"""Memory for reading back."""


def share_of(count: int, rank: int, world: int) -> Iterator[int]:
    """The numbers of the units that a worker does."""
    return (i for i in range(count) if i // UNITS_IN_A_ROW % world == rank)


def do_share(
    catalog: Catalog,
    output: Output,
    partial: Path,
    journal: Journal,
    done: Done,
    rank: int,
    world: int,
    memory_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Do what is left of one worker's share.

    Args:
        done: what was recorded before it began.
        progress: called with bytes that have been written, or found written.
    Raises:
        CheckpointError: the source is damaged or disagrees with itself, or the output cannot be written.
    """
    mine = list(share_of(len(output.units), rank, world))
    _check_source(catalog, output, rank, world)
    open_units = [(i, output.units[i]) for i in mine if i not in done.checksums]
    progress(sum(output.units[i].bytes for i in mine if i in done.checksums))
    pending: dict[int, Sums] = {}
    waiting_bytes = 0
    unseen = [i for i in mine if i in done.checksums and i not in done.verified]
    # What is on the disk is read back by another thread while the next units are written.
    with (
        ThreadPoolExecutor(1) as reader,
        Engine(
            catalog.root,
            partial,
            checksum=output.checksum,
            memory_bytes=max(0, memory_bytes - _READ_BACK_BYTES),
            checks=catalog.checks,
        ) as engine,
    ):
        reading: list[Future[None]] = []

        def read_back(sums: Mapping[int, Sums]) -> None:
            for earlier in reading:
                if earlier.done():
                    earlier.result()
            wanted = [(number, own) for number, (own, _) in sorted(sums.items())]
            reading.append(reader.submit(_read_back, partial, output, wanted))

        def finished(number: int, unit: Unit, sums: Sums) -> None:
            nonlocal waiting_bytes
            pending[number] = sums
            waiting_bytes += unit.bytes
            progress(unit.bytes)
            if waiting_bytes >= RECORD_BYTES:
                flush()

        def flush() -> None:
            nonlocal waiting_bytes
            engine.sync()
            journal.record(written=pending)
            read_back(pending)
            pending.clear()
            waiting_bytes = 0

        read_back({i: done.checksums[i] for i in unseen})
        engine.convert(open_units, finished)
        flush()
        for part in reading:
            part.result()
    journal.record(verified=unseen + [i for i, _ in open_units])


def _read_back(partial: Path, output: Output, wanted: Sequence[tuple[int, int]]) -> None:
    """Read units as they are on the disk, a few ahead of the one that is compared."""
    largest = max((output.units[i].bytes for i, _ in wanted), default=0)
    step = -(-largest // 4096) * 4096 + 4096
    depth = max(2, min(4, _READ_BACK_BYTES // max(1, step)))
    memory = np.empty(depth * step + 4096, np.uint8)
    start = memory.ctypes.data + -memory.ctypes.data % 4096
    files: dict[str, int] = {}
    with _native.FileEngine() as engine:
        try:
            tickets: dict[int, int] = {}
            for number in range(len(wanted) + depth - 1):
                if number < len(wanted):
                    unit = output.units[wanted[number][0]]
                    if unit.file not in files:
                        files[unit.file] = engine.open(str(partial / unit.file))
                    place = number % depth * step + unit.offset % 4096
                    tickets[number] = engine.read(
                        files[unit.file], start + place, unit.offset, unit.bytes
                    )
                before = number - depth + 1
                if before < 0:
                    continue
                unit = output.units[wanted[before][0]]
                engine.wait(tickets.pop(before))
                place = before % depth * step + unit.offset % 4096
                found = _native.crc32c(start + place, unit.bytes)
                if found != wanted[before][1]:
                    raise CheckpointError(
                        f"{partial / unit.file}: {unit.tensor.full_name}{unit.box} at byte {unit.offset} "
                        "reads back with other bytes than were written; the disk cannot be trusted"
                    )
        except OSError as error:
            raise CheckpointError(f"{error.filename or partial} cannot be read: {error}") from error
        finally:
            engine.wait_all()


def _check_source(catalog: Catalog, output: Output, rank: int, world: int) -> None:
    """Check what of the source has checksums and is not read just as these were made."""
    if not catalog.checks:
        return
    seen: set[tuple[str, int, int]] = set()
    needed: set[tuple[str, int, int]] = set()
    starts = {(file, offset): (file, offset, length) for file, offset, length in catalog.checks}
    for tensor, _ in output.expected:
        for piece in tensor.pieces:
            for place in piece.places:
                if (place.file, place.offset) in starts:
                    needed.add(starts[place.file, place.offset])
    for unit in output.units:
        size = unit.tensor.element_bytes
        for piece in unit.tensor.within(unit.box):
            for place in piece.places:
                region = region_of(place, piece.box.shape, size, SLOT_BYTES)
                if len(region.requests) == 1:
                    [(offset, _, length)] = region.requests
                    seen.add((place.file, offset, length))
    for file, offset, length in sorted(needed - seen)[rank::world]:
        crc = 0
        with (catalog.root / file).open("rb") as opened:
            for position in range(offset, offset + length, _READ_BYTES):
                content = bytearray(
                    os.pread(
                        opened.fileno(), min(_READ_BYTES, offset + length - position), position
                    )
                )
                part = np.frombuffer(content, np.uint8)
                crc = _native.crc32c(part.ctypes.data, part.size, crc)
        if crc != catalog.checks[file, offset, length]:
            raise CheckpointError(
                f"{catalog.root / file} is damaged: the chunk at byte {offset} has checksum {crc:08x}, not "
                f"{catalog.checks[file, offset, length]:08x}"
            )
