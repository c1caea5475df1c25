"""The upload of committed checkpoints to a store, in the background, by all ranks together.

Files are sent in parts, with retries. The manifest is sent last: a folder without one is not a
checkpoint.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypedDict

from holdfast.checkpoint.format import MANIFEST, step_of
from holdfast.checkpoint.saving import Cancelled, Coordination, Deadline, Members
from holdfast.checkpoint.stores import (
    Best,
    CheckpointStore,
    Retention,
    commit,
    has_content,
    read_manifest,
)
from holdfast.parallel.errors import CheckpointError, in_a_line
from holdfast.parallel.reading import read_regular

logger = logging.getLogger("holdfast.checkpoint")

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True)
class UploadResult:
    """How an upload ended, on the coordinator."""

    step: int
    name: str
    url: str
    bytes: int
    total_s: float
    error: str


class _Begin(TypedDict):
    """What the coordinator tells at the beginning of an upload."""

    id: str
    there: bool
    """Whether the store has the checkpoint already."""


class Uploader:
    """Uploads local checkpoints in the background, one after the other, all ranks together."""

    def __init__(
        self,
        target: CheckpointStore,
        members: Members,
        *,
        keep: int = 0,
        best: Best | None = None,
        timeout_s: float = 3600.0,
        sent: set[tuple[str, str]] | None = None,
    ) -> None:
        """Start the uploading thread.

        Args:
            target: the store; it keeps the files of an upload that earlier ranks had begun.
            keep: the number of newest checkpoints that stay there; 0: all.
            best: which stay beside these for their losses.
            timeout_s: the time after which an upload is given up.
            sent: (id of a checkpoint, file) pairs that this rank has sent before and need not send
                again; the uploader adds to it.
        """
        self._target = target
        self._members = members.with_own_connection()
        self._retention, self._timeout_s = Retention(keep, best=best), timeout_s
        self._sent = set() if sent is None else sent
        self._deadline = Deadline(timeout_s)
        """The deadline of the upload under way."""
        self._uploads = 0
        self._pending: list[Path | None] = []
        """The queue, with the upload under way; None marks its end."""
        self._is_aborted = False
        self._changed = threading.Condition()
        self._results: queue.SimpleQueue[UploadResult] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> list[Path]:
        """The local checkpoints that uploads still need."""
        with self._changed:
            return [path for path in self._pending if path is not None]

    def start(self, checkpoint: Path) -> None:
        """Upload a committed checkpoint. All ranks call this in the same order."""
        self._append(checkpoint)

    def results(self) -> list[UploadResult]:
        """The uploads that have ended since the last call."""
        found = []
        while not self._results.empty():
            found.append(self._results.get())
        return found

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the queued uploads; False when they take longer."""
        with self._changed:
            ended = self._changed.wait_for(lambda: self._is_aborted or not self._pending, timeout_s)
            return ended and not self._pending

    def abort(self, reason: str) -> None:
        """Give up the uploads under way and queued. From any thread; never blocks.

        A file on its way may still arrive. The next attempt sends the same file there as well.
        """
        logger.info("uploads are given up: %s", reason)
        self._is_aborted = True
        self._deadline.cancelled = True
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Finish the queued uploads and end the thread."""
        self._append(None)
        self._thread.join()

    def _append(self, checkpoint: Path | None) -> None:
        with self._changed:
            self._pending.append(checkpoint)
            self._changed.notify_all()

    def _next(self) -> Path | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_aborted or self._pending)
            return None if self._is_aborted else self._pending[0]

    def _work(self) -> None:
        while (checkpoint := self._next()) is not None:
            try:
                result = self._attempt(checkpoint)
            except Cancelled:
                return
            self._results.put(result)
            with self._changed:
                self._pending.pop(0)
                self._changed.notify_all()

    def _attempt(self, checkpoint: Path) -> UploadResult:
        self._uploads += 1
        began = perf_counter()
        error, size = "", 0
        coordination = Coordination(self._members, f"upload-{self._uploads}")
        try:
            size = self._upload(checkpoint, coordination)
        except Cancelled:
            raise
        except Exception as failure:
            error = str(failure)
            self._members = coordination.connected_again(coordination.said(error))
        name = checkpoint.name
        url = self._target.place_of(name)
        return UploadResult(step_of(name) or 0, name, url, size, perf_counter() - began, error)

    def _upload(self, checkpoint: Path, coordination: Coordination) -> int:
        self._deadline = deadline = Deadline(self._timeout_s)
        deadline.cancelled = self._is_aborted
        target, name = self._target, checkpoint.name
        manifest, content = read_manifest(checkpoint), read_regular(checkpoint / MANIFEST)
        coordination.enter("upload")
        if coordination.is_coordinator:
            there = self._prepare(name, content, deadline)
            coordination.report("begin", {"id": manifest.id, "there": there})
        leader = coordination.coordinator
        told = coordination.collect("begin", [leader], deadline, _Begin)[leader]
        if told["id"] != manifest.id:
            raise CheckpointError(f"{checkpoint} was replaced while its upload began")
        sizes = {file: entry.bytes for file, entry in manifest.files.items()}
        for file in share_of(sizes, self._members.rank, self._members.size):
            if not told["there"] and (manifest.id, file) not in self._sent:
                upload_file(target, checkpoint / file, name, file, deadline)
                self._sent.add((manifest.id, file))
        coordination.report("header", {})
        if coordination.is_coordinator:
            coordination.collect("header", coordination.ranks, deadline)
            self._commit(name, content, deadline)
            coordination.report("end", {})
        coordination.collect("end", [leader], deadline)
        return sum(sizes.values())

    def _prepare(self, name: str, manifest: bytes, deadline: Deadline) -> bool:
        """Prepare the store for a checkpoint. Returns whether its content is there already.

        A committed checkpoint with other content is set aside before a file of it is replaced.
        """
        target, there = self._target, False

        def prepare() -> None:
            nonlocal there
            there = has_content(target, name, manifest)
            if not there and target.has(name):
                place = target.place_of(name)
                logger.warning("%s had other content, and is %s now", place, target.set_aside(name))
            target.begin(name)

        retry(prepare, target.place_of(name), deadline)
        return there

    def _commit(self, name: str, manifest: bytes, deadline: Deadline) -> None:
        def claim() -> None:
            if deadline.cancelled:
                raise Cancelled

        def attempt() -> None:
            commit(self._target, name, manifest, retention=self._retention, claim=claim)

        retry(attempt, self._target.place_of(name), deadline)


def upload_file(
    target: CheckpointStore, source: Path, name: str, file: str, deadline: Deadline
) -> None:
    """Put one local file into a store, with the retries of `retry`."""
    place = f"{target.place_of(name)}/{file}"
    retry(lambda: target.put(source, name, file), place, deadline)


def retry(attempt: Callable[[], None], place: str, deadline: Deadline) -> None:
    """Write to a store again and again until that succeeds.

    Args:
        attempt: may be called any number of times, and may raise any error.
        place: the thing written, for messages.
    Raises:
        CheckpointError: the deadline passed; the message has the last reason.
        Cancelled: the upload was given up between two attempts.
    """
    pause = _FIRST_PAUSE_S
    while True:
        # Drivers raise errors of many kinds; all of them may pass.
        try:
            attempt()
            return
        except Exception as error:
            if deadline.cancelled:
                raise Cancelled from error
            if deadline.left_s < pause:
                raise CheckpointError(
                    f"{place} could not be uploaded: {in_a_line(error)}"
                ) from error
        deadline.pause(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def share_of(sizes: dict[str, int], rank: int, world_size: int) -> Sequence[str]:
    """The files that a rank uploads: the largest first, each to the least loaded rank. Pure."""
    load = [0] * world_size
    mine = []
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = min(range(world_size), key=load.__getitem__)
        load[least] += sizes[name]
        if least == rank:
            mine.append(name)
    return mine
