"""One save of one rank, from the snapshot to the commit.

Its phases are begin (the coordinator makes the folder), copy, write, sync, commit. Ranks report to
each other over the rendezvous store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TypedDict

from holdfast import _native
from holdfast.checkpoint.format import (
    PlannedFile,
    SaveFacts,
    WritePlan,
    attempt_of,
    build_manifest,
    encode_manifest,
    header_of,
    name_of,
)
from holdfast.checkpoint.saving.arena import Arena, Cancelled, Deadline
from holdfast.checkpoint.saving.column_join import join_pieces
from holdfast.checkpoint.saving.coordination import Coordination, Members
from holdfast.checkpoint.saving.job import SaveJob, SaveResult
from holdfast.checkpoint.saving.snapshot import Snapshot, SnapshotItem
from holdfast.checkpoint.stores import (
    LocalStore,
    Retention,
    apply_retention,
    commit,
    open_written,
)
from holdfast.parallel.comm import Communicator
from holdfast.parallel.errors import CheckpointError, HoldfastError, in_a_line, size_text
from holdfast.parallel.reading import Count

PATIENCE_S = 5.0
"""How long ranks wait beyond a deadline for the coordinator to name the late rank, in seconds."""

READERS_S = 2.0
"""Seconds for which a checkpoint on the disk outlives its replacement, for those that have just
begun to read it."""


@dataclass(frozen=True, slots=True)
class SaveResources:
    """The resources that the saves of one rank use, one after the other."""

    engine: _native.FileEngine
    arena: Arena
    join: Communicator | None
    """All ranks over CPU tensors, for weights whose columns several of them have; None: no weight
    is split so."""


@dataclass(frozen=True, slots=True)
class _End:
    """What the coordinator tells of a committed save."""

    path: str = ""
    times: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """The times of all ranks."""
    commit_s: float = 0.0
    note: str = ""


class _Begin(TypedDict):
    id: str


class _Written(TypedDict):
    crc32c: list[Count]


def reported_checksums(
    plan: WritePlan, reports: Mapping[int, _Written], members: Members
) -> dict[int, Sequence[int]]:
    """The checksums that ranks report, by rank.

    Raises:
        CheckpointError: a rank wrote more or fewer pieces than planned.
    """
    for rank, report in reports.items():
        planned, found = len(plan.written_by(rank)), len(report["crc32c"])
        if found != planned:
            raise CheckpointError(
                f"rank {members.number(rank)} has written {found} pieces and was to write "
                f"{planned}; run the same version of holdfast everywhere"
            )
    return {rank: report["crc32c"] for rank, report in reports.items()}


class _Headers(TypedDict):
    files: dict[str, Count]
    times: dict[str, float]


@dataclass(slots=True)
class PhaseSeconds:
    """The seconds that this rank spent in each phase."""

    stall_s: float = 0.0
    copy_s: float = 0.0
    write_s: float = 0.0
    sync_s: float = 0.0


class Save:
    """One save of one rank. `run` is called once, in the background thread.

    Its attributes are the results that the five phases hand to each other.
    """

    def __init__(
        self,
        job: SaveJob,
        coordination: Coordination,
        deadline: Deadline,
        resources: SaveResources,
    ) -> None:
        """Note the present state, in the training thread; nothing is copied yet."""
        self.job, self.coordination, self.deadline = job, coordination, deadline
        self._resources = resources
        written = [p for p in job.plan.pieces_of(coordination.rank) if not p.sources]
        self._local = sorted(written, key=job.before)
        """The pieces that the snapshot copies, in its order."""
        items = [
            SnapshotItem(job.source(p.name, p.box), p.file, p.offset, job.before(p))
            for p in self._local
        ]
        self.snapshot = Snapshot(items, resources.arena, deadline)
        self._facts = SaveFacts(
            id="",
            step=job.step,
            created=time.time(),
            versions=job.versions,
            scalars=job.scalars,
            config=job.config,
        )
        self._store = job.store
        """The store as this attempt writes to it; set by `_begin`."""
        self._held = contextlib.ExitStack()
        """The folder of the uncommitted checkpoint, on the coordinator once it has made it."""
        self._handles: dict[str, int] = {}
        """The engine's handle of each file that is open."""
        self._joined: Mapping[tuple[str, int], int] = {}
        """CRC-32C of the pieces that were joined here, by file and offset."""
        self._seconds = PhaseSeconds()
        self._end = _End()

    @property
    def name(self) -> str:
        return name_of(self.job.step)

    @property
    def rank(self) -> int:
        return self.coordination.rank

    def run(self) -> SaveResult:
        """Save. Errors are in the result, never raised."""
        began = perf_counter()
        path, error = None, ""
        try:
            path = self._save()
        except Cancelled:
            error = self._given_up()
        except OSError as failure:
            error = _said(failure, self.job)
        except HoldfastError as failure:
            error = str(failure)
        except Exception as failure:
            error = in_a_line(failure)
        if error:
            self.snapshot.abort()
            error = self._release(error)
        self._held.close()
        return SaveResult(
            step=self.job.step,
            tier=self.job.tier,
            path=path,
            error=error,
            bytes=self.job.plan.bytes,
            total_s=perf_counter() - began,
            times=self._times(),
            commit_s=self._end.commit_s,
            imbalance=self.job.plan.imbalance(self.coordination.size),
            note=self._end.note,
        )

    def tidy(self, hurry: threading.Event) -> None:
        """As the coordinator of a committed save, remove the checkpoints that may go.

        Args:
            hurry: ends the time that readers of the last checkpoint have.
        """
        if not (self._end.path and self.coordination.is_coordinator):
            return
        job = self.job
        if job.tier == "disk":
            hurry.wait(READERS_S)
        apply_retention(self._store, self.name, job.retention)

    def _times(self) -> dict[int, Mapping[str, float]]:
        """The times of all ranks, or of this one alone, by their numbers in the run."""
        times = self._end.times or {self.rank: self._own_times()}
        return {self.coordination.members.number(rank): found for rank, found in times.items()}

    def _given_up(self) -> str:
        """Why this save was cancelled: for a reason that was given, or because it is late."""
        reason = self.snapshot.error
        if reason is not None and not isinstance(reason, Cancelled):
            return str(reason)
        late = self.deadline.is_over()
        return f"not done within {self.deadline.seconds:g} s" if late else "it was given up"

    def _release(self, error: str) -> str:
        """Tell the others of a failure, release files and buffers. Returns the cause."""
        try:
            self.coordination.report_failure(error)
            error = self.coordination.failure() or error
        except RuntimeError:  # the store is gone
            error = self.coordination.said(error)
        for handle in self._handles.values():
            with contextlib.suppress(OSError):
                self._resources.engine.close_file(handle)
        with contextlib.suppress(CheckpointError):
            self._resources.arena.recover(0.0)
        return error

    def _save(self) -> Path:
        coordination = self.coordination
        coordination.enter("begin")
        self.snapshot.open(self._begin)
        began = perf_counter()
        coordination.enter("copy")
        self.snapshot.run()
        self._seconds.copy_s = perf_counter() - began
        coordination.enter("write")
        began = perf_counter()
        self._resources.arena.drain(self.deadline)
        self._seconds.write_s = perf_counter() - began
        self._sync_for_others()
        checksums = self._checksums()
        # Of a save that was given up, what was copied since then may have changed meanwhile.
        self.deadline.check()
        coordination.report("written", {"crc32c": checksums, "stall_s": self.snapshot.stall_s})
        coordination.enter("sync")
        began = perf_counter()
        headers = {
            file.name: self._finish_file(file)
            for file in self.job.plan.files
            if file.pieces and file.lead == self.rank
        }
        for handle in self._handles.values():
            self._resources.engine.close_file(handle)
        self._handles.clear()
        self._seconds.sync_s = perf_counter() - began
        self.deadline.check()
        coordination.report("header", {"files": headers, "times": self._own_times()})
        coordination.enter("commit")
        if coordination.is_coordinator:
            coordination.report("end", asdict(self._commit()))
        leader = coordination.coordinator
        told = coordination.collect("end", [leader], self.deadline, _End, patience_s=PATIENCE_S)
        self._end = told[leader]
        return Path(self._end.path)

    def _begin(self) -> None:
        """Prepare the folder and the files, and join the pieces that need other ranks' parts."""
        job, coordination = self.job, self.coordination
        self._resources.arena.recover(self.deadline.left_s)
        leader = coordination.coordinator
        if coordination.is_coordinator:
            self._take(uuid.uuid4().hex)
            self._claim()
            _preflight(self._store, job)
            self._held.callback(self._store.discard, self.name)
            self._store.begin(self.name)
            self._held.enter_context(self._store.written(self.name))
            coordination.report("begin", {"id": self._facts.id})
        told = coordination.collect("begin", [leader], self.deadline, _Begin)
        self._take(told[leader]["id"])
        folder = self._store.partial(self.name)
        sizes = {f.name: f.bytes for f in job.plan.files if f.pieces and f.lead == self.rank}
        for name in dict.fromkeys(p.file for p in job.plan.written_by(self.rank)):
            self._handles[name] = self._resources.engine.open(
                str(folder / name), write=True, create=True, size=sizes.get(name, -1)
            )
        self.snapshot.use(self._handles)
        coordination.enter("join")
        pieces = job.plan.pieces_of(self.rank)
        self._joined = join_pieces(
            pieces, self.rank, job.source, self._resources.join, self.snapshot
        )

    def _take(self, identity: str) -> None:
        """Work in the folder of the attempt with this random name."""
        self._facts = replace(self._facts, id=identity)
        generation = self.coordination.members.generation
        attempt = attempt_of(generation, self.coordination.name, identity)
        self._store = replace(self.job.store, attempt=attempt, generation=generation)

    def _claim(self) -> None:
        """Raise an exception if this save was given up, on this rank or another."""
        self.deadline.check()
        try:
            reason = self.coordination.failure()
        except RuntimeError as error:
            raise CheckpointError(
                f"the other ranks cannot be asked whether it still stands: {error}"
            ) from error
        if reason:
            raise CheckpointError(reason)

    def _sync_for_others(self) -> None:
        """Sync the files with a lead on another node, which cannot sync bytes cached here."""
        nodes = self.coordination.members.nodes
        leads = {f.name: f.lead for f in self.job.plan.files if f.pieces}
        for name, handle in self._handles.items():
            if nodes[leads[name]] != nodes[self.rank]:
                self._resources.engine.sync(handle)

    def _finish_file(self, file: PlannedFile) -> int:
        """Write and sync the header of a file that this rank leads. Returns its CRC-32C."""
        others = [rank for rank in file.writers if rank != self.rank]
        reports = self.coordination.collect("written", others, self.deadline, _Written)
        plan, facts = self.job.plan, self._facts
        found = reported_checksums(plan, reports, self.coordination.members)
        found[self.rank] = self._checksums()
        header, crc = header_of(plan, file, found, id=facts.id, step=facts.step)
        path = self._store.partial(self.name) / file.name
        with open_written(path) as opened:
            os.pwrite(opened.fileno(), header, 0)
            os.fsync(opened.fileno())
            size = os.fstat(opened.fileno()).st_size
        if size != file.bytes:
            raise CheckpointError(f"{path} has {size} bytes after writing, not {file.bytes}")
        return crc

    def _commit(self) -> _End:
        """As the coordinator, commit the checkpoint when every rank has written and synced."""
        job, ranks = self.job, self.coordination.ranks
        written = self.coordination.collect("written", ranks, self.deadline, _Written)
        headers = self.coordination.collect("header", ranks, self.deadline, _Headers)
        began = perf_counter()
        times = {rank: headers[rank]["times"] for rank in ranks}
        crcs = {name: crc for report in headers.values() for name, crc in report["files"].items()}
        checksums = reported_checksums(job.plan, written, self.coordination.members)
        manifest, small = build_manifest(job.plan, checksums, crcs, self._facts, job.extra_files)
        note = commit(
            self._store,
            self.name,
            encode_manifest(manifest),
            files=small,
            retention=Retention(best=job.retention.best),
            claim=self._claim,
        )
        return _End(str(self._store.path(self.name)), times, perf_counter() - began, note)

    def _checksums(self) -> Sequence[int]:
        """CRC-32C of this rank's pieces, in the order of the plan."""
        found = dict(self._joined)
        for piece, crc in zip(self._local, self.snapshot.checksums, strict=True):
            found[piece.file, piece.offset] = crc
        written = self.job.plan.written_by(self.rank)
        return [found[piece.file, piece.offset] for piece in written]

    def _own_times(self) -> dict[str, float]:
        self._seconds.stall_s = self.snapshot.stall_s
        return asdict(self._seconds)


def _preflight(store: LocalStore, job: SaveJob) -> None:
    """Refuse a save that the disk lacks room for, before anything is written."""
    needed, free = job.plan.bytes, store.free_bytes()
    if free < needed:
        store.sweep()
        free = store.free_bytes()
    if free < needed:
        raise CheckpointError(
            f"{store.root} has {size_text(free)} free and the checkpoint takes "
            f"{size_text(needed)}; free space, or lower checkpoint.keep"
        )


def _said(failure: OSError, job: SaveJob) -> str:
    """The reported reason of a save that the file system refused."""
    place = f" ({failure.filename})" if failure.filename else ""
    said = f"{failure.strerror or failure}{place}"
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            said += f"; {job.store.root} has {size_text(job.store.free_bytes())} free"
        said += "; free space, or lower checkpoint.keep"
    return said
