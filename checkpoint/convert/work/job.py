"""The whole of a conversion: open, plan, divide the work, check, name the output."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import load_torch, needs_torch, use_one_thread
from holdfast.checkpoint.convert.formats import format_named
from holdfast.checkpoint.convert.sources import DamagedEntry, EntryChecks, ReadOptions
from holdfast.checkpoint.convert.work.journal import FOLDER, ConversionJournal, Done, Lock
from holdfast.checkpoint.convert.work.request import (
    Conversion,
    PreparedConversion,
    check,
    partial_of,
    prepare,
)
from holdfast.checkpoint.convert.work.sampling import compare_sample
from holdfast.checkpoint.convert.work.worker import Share, do_share
from holdfast.checkpoint.stores import free_bytes, sync
from holdfast.parallel.errors import (
    CheckpointError,
    ConfigError,
    HoldfastError,
    number_fault,
    size_text,
)
from holdfast.parallel.files import open_added
from holdfast.parallel.output import Waiting

_POLL_S = 0.05
_PATIENCE_S = 300.0
"""Seconds for which a process waits for others that do nothing."""
_LEFT_OVER = "unset RANK and WORLD_SIZE, or OMPI_* and PMI_*, if they are left over"
_SYNCING = 16
"""The number of files that are synced at a time."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion."""

    target: Path
    source_format: str
    step: int
    tensors: Mapping[str, int]
    """The number of tensors written, by kind."""
    bytes: int
    by_rule: Counter[str]
    """The number of source tensors that fitted each rule."""
    left_out: Mapping[str, str]
    """The reason for each source tensor that is left out, by its name."""
    rounded: Mapping[tuple[str, str], int]
    """The number of tensors that changed their type, by (from, to)."""
    scaled: bool
    """Whether 8-bit weights were multiplied by their block scales."""
    compared: int
    """The number of elements of the output compared with the source."""
    resumed_bytes: int
    """The bytes that an earlier, interrupted conversion had written."""
    seconds: float


def convert(
    conversion: Conversion,
    *,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    progress: Progress = lambda done, total: None,
) -> Converted | None:
    """Convert a checkpoint into another format.

    Collective over `world` processes that see the same files and get the same arguments but for
    `rank`, for example under MPI. They communicate by the journals beside the output. A single
    process may have `workers` processes of its own.

    Args:
        conversion: source, target, format and options.
        workers: the number of processes that this process starts; only with `world` = 1.
        rank, world: the index of this process, and the number of processes that share the work.
        progress: called on rank 0 with (bytes written, bytes in all).
    Returns:
        On rank 0 the result, once the output is checked and has its name; None elsewhere.
    Raises:
        ConfigError: an option is wrong.
        CheckpointError: the source is damaged or incomplete, or the output could not be written.
            What was written stays in TARGET.partial, and the same command goes on from there.
    """
    began = time.perf_counter()
    check(conversion)
    fault = number_fault("workers", workers, 1) or number_fault("world", world, 1)
    if fault := fault or number_fault("rank", rank, 0, world - 1):
        raise ConfigError(fault)
    if world > 1 and workers > 1:
        raise ConfigError(
            f"--workers {workers} under a launcher with {world} processes: use one of the two"
        )
    if rank:
        _follow(conversion, rank, world)
        return None
    partial = partial_of(conversion)
    with _explained(partial), closing(Lock(conversion.target)):
        return _lead(conversion, workers, world, progress, began)


@contextmanager
def _explained(partial: Path) -> Iterator[None]:
    """Have an error of the disk name the file, and what becomes of the output."""
    try:
        yield
    except OSError as error:
        path = Path(os.fsdecode(error.filename or partial))
        done = "written" if path.is_relative_to(partial) else "read"
        raise CheckpointError(
            f"{path} cannot be {done}: {error.strerror or error}; what was written stays in "
            f"{partial}, and the same command goes on from there"
        ) from error


def _lead(
    conversion: Conversion, workers: int, world: int, progress: Progress, began: float
) -> Converted:
    prepared = prepare(conversion)
    partial = partial_of(conversion)
    journal = ConversionJournal(partial, 0)
    try:
        _make_room(conversion, prepared, journal)
        done = journal.read()
        resumed = sum(prepared.output.units[i].bytes for i in done.checksums)
        if workers > 1:
            _share_among_processes(conversion, prepared, journal, done, workers, progress)
        else:
            share = Share(0, world, conversion.memory_bytes)
            do_share(prepared, journal, done, share, _adder(progress, prepared.total))
            _await_others(prepared, journal, world, progress)
        ended = journal.read()
        EntryChecks(prepared.catalog.root, prepared.catalog.records).add(ended.parts)
        checksums = ended.checksums
        other = prepared.output.checksum != "crc32c"
        prepared.output.finish(partial, [checksums[i][other] for i in range(len(checksums))])
        # All at once: a filesystem writes its journal for all that wait.
        with ThreadPoolExecutor(_SYNCING) as threads:
            list(threads.map(sync, [partial / name for name in prepared.output.files]))
        output = format_named(conversion.to).read(partial, ReadOptions())
        compared = compare_sample(
            prepared.catalog.root,
            prepared.output.expected,
            output,
            prepared.output.added,
            prepared.catalog.scales,
        )
    except DamagedEntry:
        journal.void()
        raise
    finally:
        journal.close()
    journal.remove()
    _commit(partial, conversion.target)
    catalog = prepared.catalog
    return Converted(
        target=conversion.target,
        source_format=catalog.format,
        step=catalog.step,
        tensors=Counter(tensor.kind for tensor, _ in prepared.output.expected),
        bytes=prepared.total,
        by_rule=catalog.by_rule,
        left_out=catalog.left_out,
        rounded=prepared.output.rounded(),
        scaled=len(catalog.scales) > 0,
        compared=compared,
        resumed_bytes=resumed,
        seconds=time.perf_counter() - began,
    )


def _make_room(
    conversion: Conversion, prepared: PreparedConversion, journal: ConversionJournal
) -> None:
    """Create the output's files in full length, or keep those of an interrupted conversion."""
    partial, output = journal.partial, prepared.output
    if not journal.begun(prepared.fingerprint):
        free = free_bytes(partial)
        if partial.exists():
            free += sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
        if free < output.bytes:
            raise CheckpointError(
                f"{conversion.target.parent} has {size_text(free)} free and the output takes "
                f"{size_text(output.bytes)}; free space, or name a folder on another disk"
            )
    journal.begin(prepared.fingerprint)
    for name, size in output.files.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_added(path)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


def _adder(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return add


def _follow(conversion: Conversion, rank: int, world: int) -> None:
    """Run a process that a launcher started, other than the first."""
    prepared = prepare(conversion)
    journal = ConversionJournal(partial_of(conversion), rank)
    waiting = Waiting(f"the first of {world} processes to begin the conversion", _PATIENCE_S)
    while not _ready(prepared, journal):
        if waiting.left_s(_LEFT_OVER) <= 0:
            raise CheckpointError(f"the first of {world} processes has not begun; {_LEFT_OVER}")
        time.sleep(_POLL_S)
    try:
        share = Share(rank, world, conversion.memory_bytes)
        with _explained(journal.partial):
            do_share(prepared, journal, journal.read(), share, lambda nbytes: None)
    except HoldfastError as error:
        journal.fail(str(error))
        raise
    finally:
        journal.close()


def _ready(prepared: PreparedConversion, journal: ConversionJournal) -> bool:
    """Whether rank 0 has created all files."""
    if not journal.begun(prepared.fingerprint):
        return False
    try:
        sizes = {name: (journal.partial / name).stat().st_size for name in prepared.output.files}
    except OSError:
        return False
    return sizes == dict(prepared.output.files)


def _await_others(
    prepared: PreparedConversion, journal: ConversionJournal, world: int, progress: Progress
) -> None:
    """Wait until the journals of all processes together list every unit.

    Raises:
        CheckpointError: a process has failed, or none has done a unit for too long.
    """
    count, seen = len(prepared.output.units), -1
    waiting = Waiting("", _PATIENCE_S)
    while True:
        done = journal.read()
        if len(done.verified) == count:
            return
        if (units := len(done.verified) + len(done.checksums)) != seen:
            seen = units
            waiting = Waiting(f"the share of the other {world - 1} processes", _PATIENCE_S)
        if waiting.left_s(_LEFT_OVER) <= 0:
            raise CheckpointError(
                f"the other {world - 1} processes have done nothing for {_PATIENCE_S:g} s; "
                f"{_LEFT_OVER}; the same command goes on"
            )
        failure = journal.failure()
        if failure:
            raise CheckpointError(failure)
        progress(sum(prepared.output.units[i].bytes for i in done.checksums), prepared.total)
        time.sleep(_POLL_S)


def _share_among_processes(
    conversion: Conversion,
    prepared: PreparedConversion,
    journal: ConversionJournal,
    done: Done,
    workers: int,
    progress: Progress,
) -> None:
    if any(
        needs_torch(tensor.dtype, out, combines=tensor.combine != "equal")
        for tensor, out in prepared.output.expected
    ):
        load_torch()
    # A process with threads cannot be forked safely; a new process opens and plans by itself.
    forked = threading.active_count() == 1
    context: Any = multiprocessing.get_context("fork" if forked else "spawn")
    counters = context.RawArray("Q", workers)
    inherited = (prepared, done) if forked else None
    processes = [
        context.Process(
            target=_work, args=(conversion, rank, workers, counters, inherited), daemon=True
        )
        for rank in range(workers)
    ]
    with ExitStack() as ending:
        for process in processes:
            process.start()
            ending.callback(process.join)
            ending.callback(process.kill)  # SIGTERM would wait in a process that is stopped
        while alive := [process.sentinel for process in processes if process.is_alive()]:
            connection.wait(alive, _POLL_S)
            progress(sum(counters), prepared.total)
            if any(process.exitcode not in (None, 0) for process in processes):
                break
        failure = journal.failure()
        if failure:
            raise CheckpointError(failure)
        for rank, process in enumerate(processes):
            if process.exitcode not in (None, 0):
                raise CheckpointError(
                    f"worker {rank} ended with exit code {process.exitcode}; what was written "
                    f"stays in {journal.partial}, and the same command goes on from there"
                )


def _work(
    conversion: Conversion,
    rank: int,
    world: int,
    counters: Any,
    inherited: tuple[PreparedConversion, Done] | None,
) -> None:
    """Run a worker process."""
    use_one_thread()
    journal = ConversionJournal(partial_of(conversion), rank)

    def add(nbytes: int) -> None:
        counters[rank] += nbytes

    share = Share(rank, world, conversion.memory_bytes // world)
    try:
        with _explained(journal.partial):
            prepared, done = inherited or (prepare(conversion), journal.read())
            do_share(prepared, journal, done, share, add)
    except HoldfastError as error:
        journal.fail(str(error))
        os._exit(1)
    finally:
        journal.close()


def _commit(partial: Path, target: Path) -> None:
    """Give the output its name, by one rename."""
    for folder, _, _ in os.walk(partial):
        sync(Path(folder))
    if target.exists():
        target.rmdir()
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(target / FOLDER, ignore_errors=True)
