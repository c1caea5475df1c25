"""The remote tier: checkpoints at any fsspec URL, committed by their manifest as on a disk.

Files are uploaded by all ranks, in parts, with retries; the manifest goes last, so what has none is not a
checkpoint. Drivers (s3fs, gcsfs, …) are installed by whoever uses them.
"""

from __future__ import annotations

import posixpath
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from torch.distributed import Store

from holdfast.checkpoint.format import MANIFEST, Manifest, decode_manifest, directory
from holdfast.checkpoint.loading import RemoteReader
from holdfast.checkpoint.saving import Cancelled, Coordination, Deadline, own_connection
from holdfast.parallel.errors import CheckpointError, ConfigError

_PART_BYTES = 16 << 20
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


class RemoteStore:
    """A folder of checkpoints at a URL. Local."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        """Args:
            url: of the folder, e.g. `s3://bucket/run`.
            options: for the driver; credentials and end points are usually in its own environment.
        Raises:
            ConfigError: no driver for this kind of URL is installed.
        """
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._filesystem, self._path = fsspec.url_to_fs(self.url, **(options or {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.path = {url!r} cannot be used: {error}") from error

    def names(self) -> list[str]:
        """The committed checkpoints, the oldest first."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = [posixpath.basename(path.rstrip("/")) for path in found]
        steps = sorted(n for n in names if directory.step_of(Path(n)) is not None)
        return [n for n in steps if self._filesystem.exists(f"{self._path}/{n}/{MANIFEST}")]

    def manifests(self) -> Iterator[tuple[str, Manifest]]:
        """The readable checkpoints with their manifests, the newest first."""
        for name in reversed(self.names()):
            try:
                yield name, self.manifest(name)
            except CheckpointError:
                continue

    def manifest(self, name: str) -> Manifest:
        """Raises CheckpointError: there is none, or it is damaged."""
        where = f"{self.url}/{name}/{MANIFEST}"
        return decode_manifest(self.reader(name).read_file(MANIFEST), where)

    def reader(self, name: str) -> RemoteReader:
        return RemoteReader(f"{self.url}/{name}", self._filesystem, f"{self._path}/{name}")

    def put(self, local: Path, name: str, file: str, deadline: Deadline) -> float:
        """Upload one file, again and again until it is there; returns the seconds it took.

        Raises:
            CheckpointError: not before the deadline; with the last reason.
            Cancelled: it was given up between two attempts.
        """
        began = perf_counter()
        pause = _FIRST_PAUSE_S
        while True:
            # Drivers raise errors of many kinds; all of them may pass.
            try:
                self._filesystem.makedirs(f"{self._path}/{name}", exist_ok=True)
                target = f"{self._path}/{name}/{file}"
                self._filesystem.put_file(str(local), target, chunksize=_PART_BYTES)
                self._filesystem.invalidate_cache()
                size, wanted = self._filesystem.size(target), local.stat().st_size
                if size != wanted:
                    raise OSError(f"has {size} bytes after the upload, not {wanted}")
                return perf_counter() - began
            except Exception as error:
                if deadline.cancelled:
                    raise Cancelled from error
                if deadline.left_s < pause:
                    raise CheckpointError(
                        f"{self.url}/{name}/{file} could not be uploaded: {type(error).__name__}: {error}"
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def put_bytes(self, content: bytes, file: str) -> None:
        """Write a small file in one request."""
        self._filesystem.pipe_file(f"{self._path}/{file}", content)

    def retain(self, keep: int) -> list[str]:
        """Remove all but the newest `keep` checkpoints (0: none), the manifest first."""
        if keep < 1:
            return []
        removed = self.names()[:-keep]
        for name in removed:
            self._filesystem.rm_file(f"{self._path}/{name}/{MANIFEST}")
            self._filesystem.rm(f"{self._path}/{name}", recursive=True)
        return removed


@dataclass(frozen=True, slots=True)
class UploadResult:
    """How an upload ended, on the coordinator."""

    step: int
    name: str
    url: str
    bytes: int
    total_s: float
    error: str


class Uploader:
    """Uploads committed checkpoints in the background, one after the other, all ranks together."""

    def __init__(
        self,
        url: str,
        rank: int,
        world_size: int,
        store: Store,
        *,
        keep: int = 0,
        timeout_s: float = 3600.0,
        finished: Callable[[Path], None] = lambda path: None,
        uploaded: set[tuple[str, str]] | None = None,
    ) -> None:
        """Args:
        finished: called on each rank when a local checkpoint is no longer needed for uploading.
        uploaded: (checkpoint, file) that this rank has uploaded before, and need not again; added to.
        """
        self._remote = RemoteStore(url)
        self._rank, self._world_size = rank, world_size
        self._store: Store = own_connection(store)
        self._keep, self._timeout_s = keep, timeout_s
        self._finished = finished
        self._uploaded = set() if uploaded is None else uploaded
        self._deadline = Deadline(timeout_s)
        """Of the upload under way."""
        self._is_aborted = False
        self._waiting: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[UploadResult] = queue.SimpleQueue()
        self._uploads = 0
        self._pending = 0
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def start(self, checkpoint: Path) -> None:
        """Upload a committed checkpoint. Called by all ranks, in the same order."""
        with self._idle:
            self._pending += 1
        self._waiting.put(checkpoint)

    def results(self) -> list[UploadResult]:
        """Uploads that have ended since the last call."""
        found = []
        while not self._results.empty():
            found.append(self._results.get())
        return found

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is to be uploaded; False when that takes longer."""
        with self._idle:
            return self._idle.wait_for(lambda: self._pending == 0, timeout_s)

    def abort(self) -> None:
        """Give up what is under way and queued. From any thread; never blocks.

        A file that is being sent may still arrive: it is what the next attempt sends there as well.
        """
        self._is_aborted = True
        self._deadline.cancelled = True
        self._waiting.put(None)

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (checkpoint := self._waiting.get()) is not None:
            if self._is_aborted:
                return
            self._uploads += 1
            began = perf_counter()
            error, size = "", 0
            ranks = range(self._world_size)
            coordination = Coordination(self._store, f"upload-{self._uploads}", self._rank, ranks)
            try:
                size = self._upload(checkpoint, coordination)
            except Cancelled:
                return
            except Exception as failure:
                error = str(failure)
                coordination.report_failure(error)
            step = directory.step_of(checkpoint) or 0
            url = f"{self._remote.url}/{checkpoint.name}"
            self._results.put(
                UploadResult(step, checkpoint.name, url, size, perf_counter() - began, error)
            )
            self._finished(checkpoint)
            with self._idle:
                self._pending -= 1
                self._idle.notify_all()

    def _upload(self, checkpoint: Path, coordination: Coordination) -> int:
        self._deadline = deadline = Deadline(self._timeout_s)
        deadline.cancelled = self._is_aborted
        manifest = directory.read_manifest(checkpoint)
        coordination.enter("upload")
        sizes = {name: entry.bytes for name, entry in manifest.files.items()}
        for file in share_of(sizes, self._rank, self._world_size):
            if (checkpoint.name, file) not in self._uploaded:
                self._remote.put(checkpoint / file, checkpoint.name, file, deadline)
                self._uploaded.add((checkpoint.name, file))
        coordination.report("header", {})
        if coordination.is_coordinator:
            coordination.collect("header", coordination.ranks, deadline)
            self._remote.put(checkpoint / MANIFEST, checkpoint.name, MANIFEST, deadline)
            self._remote.put_bytes(f"{checkpoint.name}\n".encode(), directory.LATEST)
            self._remote.retain(self._keep)
            coordination.report("end", {})
        coordination.collect("end", [coordination.coordinator], deadline)
        return sum(sizes.values())


def share_of(sizes: dict[str, int], rank: int, world_size: int) -> Sequence[str]:
    """The files that a rank uploads: the largest first, each to the rank with the least so far. Pure."""
    load = [0] * world_size
    mine = []
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = min(range(world_size), key=load.__getitem__)
        load[least] += sizes[name]
        if least == rank:
            mine.append(name)
    return mine
