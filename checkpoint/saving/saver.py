"""The saves of one rank, one at a time, each in a background thread.

A save that fails or is late is given up, with the rank and the phase named. The last checkpoint
stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading

from holdfast import _native
from holdfast.checkpoint.saving.arena import Arena, Deadline
from holdfast.checkpoint.saving.coordination import Coordination, Members
from holdfast.checkpoint.saving.job import SaveJob, SaveResult
from holdfast.checkpoint.saving.save import PATIENCE_S, Save, SaveResources
from holdfast.checkpoint.saving.snapshot import ALL
from holdfast.parallel.comm import Communicator

_STUCK = "the save before is still under way"


class Saver:
    """Saves of one rank, one at a time. The training thread calls `start` and `fence`."""

    def __init__(
        self,
        members: Members,
        *,
        arena_bytes: int,
        timeout_s: float = 600.0,
        join: Communicator | None = None,
        pinned: bool = False,
    ) -> None:
        """Allocate the arena and open the file engine.

        Args:
            arena_bytes: host memory between the state and the disk.
            timeout_s: the time after which a save is given up.
            join: the tensor-parallel group over CPU tensors, for weights split along columns.
            pinned: use page-locked memory, because the state is on a GPU.
        """
        self._members = members.with_own_connection()
        self._timeout_s = timeout_s
        engine = _native.FileEngine()
        arena = Arena(engine, arena_bytes, pinned=pinned)
        self._resources = SaveResources(engine, arena, join)
        self._save: Save | None = None
        self._thread: threading.Thread | None = None
        self._results: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._saves = 0
        self._finished: Coordination | None = None
        """The coordination of the newest successful save, until its keys are removed."""

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def engine(self) -> _native.FileEngine:
        """The engine that writes the files."""
        return self._resources.engine

    def start(self, job: SaveJob) -> None:
        """Begin a save of the present state. All ranks call this.

        If the last save is still under way, which `wait` prevents, this one fails on all ranks.
        Until `fence` has let everything pass, the state must change only behind `fence`.
        """
        self._saves += 1
        coordination = Coordination(self._members, f"{self._saves}")
        if self.busy:
            coordination.phase = "begin"
            coordination.report_failure(_STUCK)
            tier, size = job.tier, job.plan.bytes
            self._results.put(SaveResult(job.step, tier, None, _STUCK, size, 0.0, {}))
            return
        save = Save(job, coordination, Deadline(self._timeout_s), self._resources)
        self._save = save
        self._thread = threading.Thread(
            target=self._run, args=(save,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def fence(self, number: int) -> int:
        """Wait until everything with `before` <= `number` is copied; see `Snapshot.fence`."""
        return self._save.snapshot.fence(number) if self._save is not None else ALL

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the save under way, if any, is committed; False when that takes longer."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    def results(self) -> list[SaveResult]:
        """The saves that have ended since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._results.get_nowait())
        return found

    def abort(self, reason: str) -> None:
        """Give up the save under way: fences open at once. From any thread; never blocks."""
        save, join = self._save, self._resources.join
        if self.busy and save is not None:
            save.snapshot.abort(reason)
            if join is not None:
                join.abort(reason)

    def cancel(self, reason: str, patience_s: float = PATIENCE_S) -> None:
        """Give up the save under way; return once nothing reads the state any more. Local.

        Args:
            patience_s: how long the thread's end is waited for; a later end comes by itself.
        """
        self.abort(reason)
        if self._thread is not None and self._save is not None:
            self._save.snapshot.cancel(reason)
            self._thread.join(patience_s)

    def close(self) -> None:
        """Finish the save under way and release files and memory."""
        self.wait()
        self.engine.close()

    def _run(self, save: Save) -> None:
        _lower_priority()
        result = save.run()
        if not result.error:
            # All ranks take part in this save, so they have read all reports of the one before.
            with contextlib.suppress(RuntimeError):
                if self._finished is not None:
                    self._finished.clear()
            self._finished = save.coordination
        self._results.put(result)


def _lower_priority() -> None:
    """Lower this thread's priority, so that computing threads go first; fences are unaffected."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
