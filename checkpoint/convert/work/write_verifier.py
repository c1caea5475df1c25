"""The write verifier: flushes, records and reads back units while the next ones are converted."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from holdfast import _native
from holdfast.checkpoint.convert.elements import UNIT_BYTES, GrowingMemory, Output, Unit
from holdfast.checkpoint.convert.sources import OpenFiles, Sums
from holdfast.checkpoint.convert.work.journal import ConversionJournal
from holdfast.checkpoint.format import ALIGNMENT
from holdfast.checkpoint.stores import sync
from holdfast.parallel.errors import CheckpointError

MEMORY_BYTES = 4 * (UNIT_BYTES + 2 * ALIGNMENT)
"""The memory for units that are read back, unless a single unit needs more."""
MOST_WAITING = 2
"""The groups of written units that may wait; with more, the conversion waits."""


class WriteVerifier:
    """Flushes, records and reads back groups of written units, in order, in its own thread.

    Local.
    """

    def __init__(self, partial: Path, output: Output, journal: ConversionJournal) -> None:
        self._partial, self._output, self._journal = partial, output, journal
        self._waiting: deque[Future[None]] = deque()
        self._memory = GrowingMemory()
        with ExitStack() as opened:
            self._engine = opened.enter_context(_native.FileEngine())
            self._thread = opened.enter_context(ThreadPoolExecutor(1))
            self._closing = opened.pop_all()
        self._files = OpenFiles(partial, self._engine.open, self._engine.close_file)

    def __enter__(self) -> WriteVerifier:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def add(self, sums: Mapping[int, Sums], *, recorded: bool = False) -> None:
        """Queue a group of written units.

        Args:
            sums: the checksums of the units, by number.
            recorded: whether they are durable and the journal has them.
        Raises:
            CheckpointError: earlier units could not be made durable, or read back differently.
        """
        while len(self._waiting) >= MOST_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._flush_and_verify, dict(sums), recorded))

    def finish(self) -> None:
        """Wait for all groups. Raises as `add` does."""
        while self._waiting:
            self._waiting.popleft().result()

    def _flush_and_verify(self, sums: Mapping[int, Sums], recorded: bool) -> None:
        units = [(self._output.units[number], own) for number, (own, _) in sorted(sums.items())]
        try:
            files = dict.fromkeys(unit.file for unit, _ in units)
            if not recorded:
                for file in files:
                    sync(self._partial / file)
                self._journal.record(written=sums)
            self._read_back(units)
            self._files.close()
        except OSError as error:
            where = error.filename or self._partial
            raise CheckpointError(f"{where} is not safely on the disk: {error.strerror}") from error
        finally:
            with suppress(OSError):
                self._engine.wait_all()

    def _read_back(self, wanted: Sequence[tuple[Unit, int]]) -> None:
        """Read units from the disk in whole blocks, a few ahead of the one that is compared."""
        largest = max((unit.bytes for unit, _ in wanted), default=0)
        step = -(-largest // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        depth = max(2, min(4, MEMORY_BYTES // step))
        start = self._memory.take(depth * step).ctypes.data
        tickets: deque[int] = deque()
        for number in range(len(wanted) + depth - 1):
            if number < len(wanted):
                unit, _ = wanted[number]
                place = start + number % depth * step
                tickets.append(self._begin(unit, place))
            before = number - depth + 1
            if before < 0 or before >= len(wanted):
                continue
            unit, own = wanted[before]
            self._engine.wait(tickets.popleft())
            place = start + before % depth * step + unit.offset % ALIGNMENT
            if _native.crc32c(place, unit.bytes) != own:
                raise CheckpointError(
                    f"{self._partial / unit.file}: {unit.tensor.full_name}{unit.box} at byte "
                    f"{unit.offset} "
                    "reads back with other bytes than were written; the disk cannot be trusted"
                )

    def _begin(self, unit: Unit, address: int) -> int:
        first = unit.offset // ALIGNMENT * ALIGNMENT
        end = -(-(unit.offset + unit.bytes) // ALIGNMENT) * ALIGNMENT
        end = min(end, self._output.files[unit.file])
        return self._engine.read(self._files[unit.file], address, first, end - first)
