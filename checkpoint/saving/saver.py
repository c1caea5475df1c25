"""The saves of one rank, one at a time, each in a background thread.

A save that fails or is late is given up, with the rank and the phase named. The last checkpoint
stays as it was. Giving up waits for no disk: the thread of the save ends by itself, whenever the
disk lets it, and removes what it wrote.
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
from holdfast.checkpoint.saving.save import Save, SaveResources
from holdfast.checkpoint.saving.snapshot import ALL
from holdfast.parallel.comm import Communicator

_STUCK = "the save before is still under way"
_TIDY_S = 5.0
"""How long the removal of old checkpoints is waited for at the end, in seconds."""


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
            join: all ranks, over CPU tensors, for weights split along columns.
            pinned: use page-locked memory, because the state is on a GPU.
        """
        self._members = members.with_own_connection()
        self._timeout_s = timeout_s
        engine = _native.FileEngine()
        arena = Arena(engine, arena_bytes, pinned=pinned)
        self._resources = SaveResources(engine, arena, join)
        self._save: Save | None = None
        self._thread: threading.Thread | None = None
        self._ended, self._over = threading.Event(), threading.Event()
        """Set once the save has ended; once it has, or it was given up."""
        self._hurry = threading.Event()
        """Set once the thread of the newest save must no longer spare the checkpoint before it."""
        self._results: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._saves = 0
        self._finished: Coordination | None = None
        """The coordination of the newest successful save, until its keys are removed."""

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and not self._ended.is_set()

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
        self._ended.clear()
        self._over.clear()
        before, self._hurry = self._tidied(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(save, before, self._hurry), name="checkpoint", daemon=True
        )
        self._thread.start()

    def fence(self, number: int) -> int:
        """Wait until everything with `before` <= `number` is copied; see `Snapshot.fence`."""
        return self._save.snapshot.fence(number) if self._save is not None else ALL

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the save under way, if any, has ended.

        Returns:
            False when that takes longer, or when the save is given up meanwhile and the disk still
            holds its thread.
        """
        if self._thread is not None:
            self._over.wait(timeout_s)
        return not self.busy

    def settle(self, timeout_s: float) -> bool:
        """Wait until the thread of a save that was given up has ended; False if it takes longer."""
        return self._thread is None or self._ended.wait(timeout_s)

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
            self._over.set()

    def close(self) -> None:
        """Finish the save under way and release files and memory.

        A save that was given up, and still waits for its disk, keeps them until it ends.
        """
        if self.wait():
            if (thread := self._tidied()) is not None:
                thread.join(_TIDY_S)
            self.engine.close()

    def _tidied(self) -> threading.Thread | None:
        """The thread of the newest save, which removes old checkpoints now, without delay."""
        self._hurry.set()
        return self._thread

    def _run(self, save: Save, before: threading.Thread | None, hurry: threading.Event) -> None:
        _lower_priority()
        try:
            if before is not None:
                before.join(save.deadline.left_s)
                save.coordination.use(self._members)
            result = self._result_of(save)
            self._results.put(result)
        finally:
            self._ended.set()
            self._over.set()
        if result.error:
            self._members = save.coordination.connected_again(result.error)
        save.tidy(hurry)

    def _result_of(self, save: Save) -> SaveResult:
        result = save.run()
        if not result.error:
            # All ranks take part in this save, so they have read all reports of the one before.
            with contextlib.suppress(RuntimeError):
                if self._finished is not None:
                    self._finished.clear()
            self._finished = save.coordination
        return result


def _lower_priority() -> None:
    """Lower this thread's priority, so that computing threads go first; fences are unaffected."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
