"""The checkpoint manager: saves and loads the state of a rank, together with the other ranks.

The public API (`holdfast.checkpoint.Checkpointer`) and the trainer's `Checkpoints` are built on it.
They decide what is saved and when; the manager moves the state to the disk and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from holdfast.checkpoint.format import Manifest
from holdfast.checkpoint.loading import (
    LoadRequest,
    LoadStatistics,
    NodeMeeting,
    Targets,
    check_coverage,
    load,
)
from holdfast.checkpoint.saving import Members, SaveJob, Saver, SaveResult
from holdfast.checkpoint.stores import StoredCheckpoint
from holdfast.checkpoint.tools import check_small_parts
from holdfast.parallel.comm import Communicator
from holdfast.parallel.layout import Box

LARGEST_ARENA_BYTES = 2 << 30
_ARENA_SLACK_BYTES = 16 << 20
_PATIENCE_S = 10.0
"""How long the end of a save is waited for beyond its deadline, in seconds."""

Wanted = Mapping[int, Mapping[str, Sequence[Box]]]
"""The boxes that each rank of a node needs, by tensor."""


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """Limits of saves and loads."""

    arena_bytes: int = 0
    """Host memory between the state and the disk; 0: enough for this rank's part, 2 GiB at most."""
    timeout_s: float = 600.0
    """Seconds after which a save is given up, and a load that waits for other ranks."""
    verify: bool = True
    """Whether each loaded piece is checked against its checksum."""


class CheckpointManager:
    """Saves and loads the state of one rank. One save at a time, in the background.

    All members call `save` and `load`, in the same order. Everything else is local.
    """

    def __init__(
        self,
        members: Members,
        settings: ManagerSettings,
        *,
        make_join: Callable[[], Communicator | None] = lambda: None,
    ) -> None:
        """Nothing is opened before the first save or load.

        Args:
            members: the ranks that save and load together; equal on all members but for `rank`.
            make_join: called at the first save; returns the communicator over CPU tensors whose
                members hold columns of the same weights; None where no two do.
        """
        self.members = members
        self._settings = settings
        self._make_join = make_join
        self._saver: Saver | None = None

    @property
    def longest_wait_s(self) -> float:
        """How long a call may wait for the disk or for other ranks, in seconds."""
        return self._settings.timeout_s + _PATIENCE_S

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._saver is not None and self._saver.busy

    def save(self, job: SaveJob) -> None:
        """Begin to save the present state; a save under way is waited for first. Collective.

        Until `fence` has let everything pass, the state must change only behind `fence`.
        """
        saver = self._open_saver(job)
        saver.wait(self.longest_wait_s)
        saver.start(job)

    def lead(self, coordinator: int) -> None:
        """Have this rank coordinate the saves. All members call it, before the first save."""
        self.members = replace(self.members, coordinator=coordinator)

    def fence(self, number: int) -> int:
        """Wait until everything with `before` <= `number` is copied; see `Snapshot.fence`."""
        return self._saver.fence(number) if self._saver is not None else 1 << 62

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the save under way, if any, has ended; False when that takes longer.

        Also False when it is given up meanwhile, and its thread still waits for the disk.
        """
        return self._saver is None or self._saver.wait(timeout_s)

    def finish(self) -> bool:
        """Wait for the save under way as long as it may take; False when it takes longer still."""
        return self.wait(self.longest_wait_s)

    def settle(self, timeout_s: float) -> bool:
        """Wait until a save that was given up has ended, committed or not; False if it takes
        longer: its disk holds it."""
        return self._saver is None or self._saver.settle(timeout_s)

    def results(self) -> list[SaveResult]:
        """The saves that have ended since the last call."""
        return self._saver.results() if self._saver is not None else []

    def load(
        self,
        checkpoint: StoredCheckpoint,
        name: str,
        prepare: Callable[[Manifest], tuple[Targets, Wanted]],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[Manifest, LoadStatistics]:
        """Load this rank's state from a checkpoint; each byte is read once per node. Collective.

        Args:
            name: the name of this load, never used before among these members.
            prepare: given the manifest, returns the targets of this rank's boxes and the boxes that
                every rank of its node wants. All members call it before any tensor is read.
            check: called while other ranks are waited for; an exception from it ends the load.
        Raises:
            CheckpointError: the checkpoint is damaged, incomplete, or has other shapes; raised on
                every rank of the node.
            PeerLost: a rank of the node died.
        """
        manifest = checkpoint.manifest()
        check_coverage(manifest, checkpoint.place)
        targets, wanted = prepare(manifest)
        members, timeout_s = self.members, self._settings.timeout_s
        here = members.neighbours
        reader = checkpoint.reader()
        try:
            files = list(manifest.files)[here.index(members.rank) :: len(here)]
            check_small_parts(manifest, reader, files)
            request = LoadRequest(
                manifest,
                reader,
                targets,
                wanted,
                members.rank,
                where=checkpoint.place,
                verify=self._settings.verify,
            )
            meeting = NodeMeeting(members.store, name, timeout_s, check, members.number)
            statistics = load(request, meeting)
        finally:
            reader.close()
        return manifest, statistics

    def abort(self, reason: str) -> None:
        """Give up the save under way. From any thread; never blocks.

        Fences open at once, and `wait` returns. What is still read of the state is not used: a save
        that was given up is never committed, whatever its thread does until it ends.
        """
        if self._saver is not None:
            self._saver.abort(reason)

    def close(self) -> None:
        """Finish the save under way and release files and memory."""
        if self._saver is not None:
            self._saver.close()
            self._saver = None

    def _open_saver(self, job: SaveJob) -> Saver:
        if self._saver is None:
            share = job.plan.written_bytes().get(self.members.rank, 0)
            enough = min(LARGEST_ARENA_BYTES, share + _ARENA_SLACK_BYTES)
            self._saver = Saver(
                self.members,
                arena_bytes=self._settings.arena_bytes or enough,
                timeout_s=self._settings.timeout_s,
                join=self._make_join(),
                pinned=job.pinned,
            )
        return self._saver
