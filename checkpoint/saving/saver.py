"""One rank's part in saving: from the snapshot to the commit, in a background thread.

Phases: begin (the coordinator makes the folder), copy, write, sync, commit. Ranks report over the store; a save
that fails or is late is given up, with the rank and the phase named, and leaves the last checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from torch.distributed import Store

from holdfast import _native
from holdfast.checkpoint.format import (
    PlannedFile,
    PlannedPiece,
    build_manifest,
    directory,
    encode_manifest,
    header_of,
)
from holdfast.checkpoint.saving.arena import Arena, Cancelled, Deadline
from holdfast.checkpoint.saving.column_join import join_pieces
from holdfast.checkpoint.saving.coordination import Coordination
from holdfast.checkpoint.saving.job import SaveJob, SaveResult
from holdfast.checkpoint.saving.snapshot import Snapshot, SnapshotItem
from holdfast.parallel.comm import Communicator
from holdfast.parallel.errors import CheckpointError, HoldfastError

_PATIENCE_S = 5.0
_STUCK = "the save before is still under way"


class Saver:
    """Saves of one rank, one at a time. `start` and `fence` are called by the thread that trains."""

    def __init__(
        self,
        rank: int,
        nodes: Sequence[int],
        store: Store,
        *,
        arena_bytes: int,
        timeout_s: float = 600.0,
        join: Communicator | None = None,
        pinned: bool = False,
    ) -> None:
        """Args:
        nodes: the node of each rank; their number is that of the ranks.
        arena_bytes: host memory between the state and the disk.
        timeout_s: after which a save is given up.
        join: the tensor-parallel group, for weights split along columns; over CPU tensors.
        pinned: page-locked memory, when the state is on a GPU.
        """
        self.rank, self._nodes = rank, tuple(nodes)
        self._store: Store = own_connection(store)
        self._timeout_s = timeout_s
        self._join = join
        self.engine = _native.FileEngine()
        self.arena = Arena(self.engine, arena_bytes, pinned=pinned)
        self._thread: threading.Thread | None = None
        self._snapshot: Snapshot | None = None
        self._results: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._saves = 0
        self._finished: Coordination | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    def start(self, job: SaveJob) -> None:
        """Begin a save of the state as it is now. Called by all ranks.

        Where the save before is still under way, which `wait` avoids, this one fails on all ranks.

        The state must not change but behind `fence` until `fence` has let everything pass.
        """
        self._saves += 1
        ranks = range(len(self._nodes))
        coordination = Coordination(self._store, f"{self._saves}", self.rank, ranks)
        if self.busy:
            coordination.phase = "begin"
            coordination.report_failure(_STUCK)
            tier, size = job.tier, job.plan.bytes
            self._results.put(SaveResult(job.step, tier, None, _STUCK, size, 0.0, {}))
            return
        deadline = Deadline(self._timeout_s)
        written = [c for c in job.plan.pieces_of(self.rank) if not c.sources]
        local = sorted(written, key=job.before)
        items = [
            SnapshotItem(job.source(c.name, c.box), c.file, c.offset, job.before(c)) for c in local
        ]
        snapshot = Snapshot(items, self.arena, deadline)
        save = _Save(job, coordination, deadline, snapshot, local)
        self._snapshot = snapshot
        self._thread = threading.Thread(
            target=self._run, args=(save,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def fence(self, number: int) -> int:
        """Wait until what `before` <= number protects is copied; see `Snapshot.fence`."""
        return self._snapshot.fence(number) if self._snapshot is not None else 1 << 62

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the save under way, if any, and for its commit; False when it takes longer."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    def results(self) -> list[SaveResult]:
        """Saves that have ended since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._results.get_nowait())
        return found

    def cancel(self, reason: str, patience_s: float = _PATIENCE_S) -> None:
        """Give up the save under way, and return once nothing reads the state any more. Local.

        Args:
            patience_s: how long the thread's end is waited for; later it ends by itself.
        """
        self.abort(reason)
        if self._thread is not None and self._snapshot is not None:
            self._snapshot.cancel(reason)
            self._thread.join(patience_s)

    def abort(self, reason: str) -> None:
        """Give up the save under way: fences open at once. From any thread; never blocks."""
        if self.busy and self._snapshot is not None:
            self._snapshot.abort(reason)
            if self._join is not None:
                self._join.abort(reason)

    def close(self) -> None:
        """Finish the save under way and release files and memory."""
        self.wait()
        self.engine.close()

    def _run(self, save: _Save) -> None:
        began = perf_counter()
        _lower_priority()
        path, error, total = None, "", save.job.plan.bytes
        try:
            path = self._save(save)
        except Cancelled:
            error = f"rank {self.rank}, {save.coordination.phase}: not done within {self._timeout_s:g} s"
            if isinstance(save.snapshot.error, CheckpointError):
                error = str(save.snapshot.error)
        except OSError as failure:
            error = _said(failure, save.job)
        except HoldfastError as failure:
            error = str(failure)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        if error:
            save.snapshot.abort()
            error = self._release(save, error)
        if not save.times:
            save.times[self.rank] = save.own_times()
        self._results.put(
            SaveResult(
                step=save.job.step,
                tier=save.job.tier,
                path=path,
                error=error,
                bytes=total,
                total_s=perf_counter() - began,
                times=save.times,
                commit_s=save.commit_s,
                imbalance=save.job.plan.imbalance(len(self._nodes)),
            )
        )

    def _release(self, save: _Save, error: str) -> str:
        """Tell the others, release files and buffers; returns what is known of the cause."""
        with contextlib.suppress(RuntimeError):
            save.coordination.report_failure(error)
            error = save.coordination.failure() or error
        for handle in save.handles.values():
            with contextlib.suppress(OSError):
                self.engine.close_file(handle)
        with contextlib.suppress(CheckpointError):
            self.arena.recover(0.0)
        if save.coordination.is_coordinator and save.partial is not None:
            shutil.rmtree(save.partial, ignore_errors=True)
        return error

    def _save(self, save: _Save) -> Path:
        job, coordination = save.job, save.coordination
        coordination.enter("begin")
        save.snapshot.open(lambda: self._begin(save))
        began = perf_counter()
        coordination.enter("copy")
        save.snapshot.run()
        save.copy_s = perf_counter() - began
        coordination.enter("write")
        began = perf_counter()
        self.arena.drain(save.deadline)
        save.write_s = perf_counter() - began
        self._sync_for_others(save)
        coordination.report(
            "written", {"crc32c": save.checksums(), "stall_s": save.snapshot.stall_s}
        )
        coordination.enter("sync")
        began = perf_counter()
        headers = {
            file.name: self._finish_file(save, file)
            for file in job.plan.files
            if file.pieces and file.lead == self.rank
        }
        for handle in save.handles.values():
            self.engine.close_file(handle)
        save.handles.clear()
        save.sync_s = perf_counter() - began
        coordination.report("header", {"files": headers, "times": save.own_times()})
        coordination.enter("commit")
        if coordination.is_coordinator:
            path = self._commit(save)
            coordination.report("end", {"path": str(path)})
        told = coordination.collect(
            "end", [coordination.coordinator], save.deadline, patience_s=_PATIENCE_S
        )[coordination.coordinator]
        # Whoever takes part in this save has read all of the one before.
        if self._finished is not None:
            self._finished.clear()
        self._finished = coordination
        return Path(told["path"])

    def _begin(self, save: _Save) -> None:
        """The folder, the files and whatever needs other ranks' parts."""
        job, coordination = save.job, save.coordination
        self.arena.recover(save.deadline.left_s)
        if coordination.is_coordinator:
            _preflight(job)
            save.partial = directory.begin(job.root, job.step)
            coordination.report("begin", {"id": uuid.uuid4().hex})
        save.id = coordination.collect("begin", [coordination.coordinator], save.deadline)[
            coordination.coordinator
        ]["id"]
        folder = job.root / (directory.name_of(job.step) + directory.PARTIAL)
        sizes = {f.name: f.bytes for f in job.plan.files if f.pieces and f.lead == self.rank}
        for name in dict.fromkeys(c.file for c in job.plan.written_by(self.rank)):
            save.handles[name] = self.engine.open(
                str(folder / name), write=True, create=True, size=sizes.get(name, -1)
            )
        save.folder = folder
        save.snapshot.use(save.handles)
        if self._join is not None:
            coordination.enter("join")
            save.joined = join_pieces(
                job.plan.pieces_of(self.rank), self.rank, job.source, self._join, save.snapshot
            )

    def _sync_for_others(self, save: _Save) -> None:
        """Sync files whose lead is on another node, and so cannot sync what this node has cached."""
        leads = {f.name: f.lead for f in save.job.plan.files if f.pieces}
        for name, handle in save.handles.items():
            if self._nodes[leads[name]] != self._nodes[self.rank]:
                self.engine.sync(handle)

    def _finish_file(self, save: _Save, file: PlannedFile) -> int:
        """Write the header of a file that this rank leads, and sync it; returns the header's CRC-32C."""
        others = [rank for rank in file.writers if rank != self.rank]
        reports = save.coordination.collect("written", others, save.deadline)
        found = {rank: report["crc32c"] for rank, report in reports.items()}
        found[self.rank] = save.checksums()
        header, crc = header_of(save.job.plan, file, found, id=save.id, step=save.job.step)
        path = save.folder / file.name
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, header, 0)
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if size != file.bytes:
            raise CheckpointError(f"{path} has {size} bytes after writing, not {file.bytes}")
        return crc

    def _commit(self, save: _Save) -> Path:
        """Coordinator: when every rank has written and synced, make the folder a checkpoint."""
        job, ranks = save.job, save.coordination.ranks
        written = save.coordination.collect("written", ranks, save.deadline)
        headers = save.coordination.collect("header", ranks, save.deadline)
        began = perf_counter()
        for rank in ranks:
            save.times[rank] = headers[rank]["times"]
        crcs = {name: crc for report in headers.values() for name, crc in report["files"].items()}
        assert save.partial is not None
        manifest, small_files = build_manifest(
            job.plan,
            {rank: report["crc32c"] for rank, report in written.items()},
            crcs,
            id=save.id,
            step=job.step,
            created=save.created,
            versions=job.versions,
            scalars=job.scalars,
            config=job.config,
            extra_files=job.extra_files,
        )
        for name, content in small_files.items():
            directory.write_synced(save.partial / name, content)
        path = directory.commit(save.partial, encode_manifest(manifest))
        save.partial = None
        with contextlib.suppress(OSError):
            directory.retain(job.root, job.keep, job.protected())
        save.commit_s = perf_counter() - began
        return path


@dataclass(slots=True)
class _Save:
    """One save while it is under way."""

    job: SaveJob
    coordination: Coordination
    deadline: Deadline
    snapshot: Snapshot
    local: Sequence[PlannedPiece]
    """What the snapshot copies, in its order."""
    created: float = field(default_factory=time.time)
    id: str = ""
    folder: Path = Path()
    partial: Path | None = None
    """The coordinator's folder, until it is committed."""
    handles: dict[str, int] = field(default_factory=dict)
    joined: Mapping[tuple[str, int], int] = field(default_factory=dict)
    times: dict[int, dict[str, float]] = field(default_factory=dict)
    copy_s: float = 0.0
    write_s: float = 0.0
    sync_s: float = 0.0
    commit_s: float = 0.0

    def checksums(self) -> list[int]:
        """CRC-32C of this rank's pieces in the order of the plan."""
        found = dict(self.joined)
        for piece, crc in zip(self.local, self.snapshot.checksums, strict=True):
            found[piece.file, piece.offset] = crc
        rank = self.coordination.rank
        return [found[piece.file, piece.offset] for piece in self.job.plan.written_by(rank)]

    def own_times(self) -> dict[str, float]:
        return {
            "stall_s": self.snapshot.stall_s,
            "copy_s": self.copy_s,
            "write_s": self.write_s,
            "sync_s": self.sync_s,
        }


def own_connection(store: Store) -> Store:
    """A connection to the same store for another thread; the store itself where it has none."""
    try:
        return store.clone()  # pyrefly: ignore
    except (RuntimeError, NotImplementedError):
        return store


def _preflight(job: SaveJob) -> None:
    """Refuse a save that the disk has no room for, before anything is written."""
    free = directory.free_bytes(job.root)
    if free < job.plan.bytes:
        raise CheckpointError(
            f"{job.root} has {free / 2**30:.2f} GiB free and the checkpoint takes "
            f"{job.plan.bytes / 2**30:.2f} GiB; free space, or lower checkpoint.keep"
        )


def _said(failure: OSError, job: SaveJob) -> str:
    """What a save that the file system refused is reported as."""
    place = f" ({failure.filename})" if failure.filename else ""
    said = f"{failure.strerror or failure}{place}"
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            said += f"; {job.root} has {directory.free_bytes(job.root) / 2**30:.2f} GiB free"
        said += "; free space, or lower checkpoint.keep"
    return said


def _lower_priority() -> None:
    """Let threads that compute go first; a fence copies in its own thread, so nothing waits for this."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
