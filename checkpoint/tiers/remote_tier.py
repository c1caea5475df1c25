"""The remote tier of a run: which local checkpoints go to its store, and which are under way."""

from __future__ import annotations

import logging

import torch

from holdfast.checkpoint.format import name_of, step_of
from holdfast.checkpoint.saving import Members
from holdfast.checkpoint.stores import Best, CheckpointStore, LocalStore
from holdfast.checkpoint.tiers.uploader import Uploader, UploadResult
from holdfast.parallel.comm import Communicator

logger = logging.getLogger("holdfast.checkpoint")

_CARRIED = 8
"""Uploads that begin again after a change of ranks; older checkpoints would soon be removed."""


class RemoteTier:
    """Uploads every nth committed checkpoint of a folder. Every rank counts the same commits."""

    def __init__(
        self,
        source: LocalStore,
        target: CheckpointStore,
        members: Members,
        *,
        every: int,
        keep: int,
        best: Best | None = None,
    ) -> None:
        """Nothing is opened before the first upload.

        Args:
            every: upload one of this many commits, the first included.
            keep: the number of newest checkpoints that stay in `target`; 0: all.
            best: which stay there beside these for their losses.
        """
        self._source, self._target, self._members = source, target, members
        self._every, self._keep, self._best = every, keep, best
        self._commits = 0
        self._sent: set[tuple[str, str]] = set()
        """(id of a checkpoint, file) that this rank has sent."""
        self._carried: list[str] = []
        """The checkpoints that wait for a change of ranks: until it stands, or, once uploads were
        given up, for the tier that follows."""
        self._uploader: Uploader | None = None
        self._is_aborted = False

    @property
    def pending(self) -> set[str]:
        """The names of local checkpoints that uploads still need."""
        under_way = {path.name for path in self._uploader.pending} if self._uploader else set()
        return under_way.union(self._carried)

    def committed(self, name: str) -> None:
        """Count a commit, and upload the checkpoint if its turn has come."""
        self._commits += 1
        if (self._commits - 1) % self._every == 0:
            self.upload(name)

    def upload(self, name: str) -> None:
        """Queue a local checkpoint. All ranks call this in the same order."""
        if self._is_aborted:
            self._carried.append(name)
            return
        if self._uploader is None:
            self._uploader = Uploader(
                self._target, self._members, keep=self._keep, best=self._best, sent=self._sent
            )
        self._uploader.start(self._source.path(name))

    def upload_missing(self, name: str, control: Communicator) -> None:
        """Upload a local checkpoint that the store lacks, because its run ended first.

        Collective.
        """
        missing = torch.zeros(1, dtype=torch.float64)
        if self._members.rank == 0:
            # A store that does not answer now, for whatever reason, is asked again while uploading.
            try:
                missing += name not in self._target.names()
            except Exception as error:
                logger.warning("%s does not answer: %s", self._target.place_of(""), error)
                missing += 1
        control.all_reduce(missing).wait()
        if missing.item():
            self.upload(name)

    def agree(self, before: RemoteTier | None, control: Communicator) -> None:
        """Agree on the checkpoints that the ranks before had not uploaded yet.

        Collective over `control`. `before` stays as it is.
        """
        waiting: list[int] = []
        if before is not None:
            self._sent |= before._sent
            steps = (step_of(name) for name in before.pending)
            waiting = sorted(step for step in steps if step is not None)[-_CARRIED:]
        mine = torch.full((_CARRIED,), -1, dtype=torch.int64)
        mine[: len(waiting)] = torch.tensor(waiting, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(control.size)]
        control.all_gather(parts, mine).wait()
        steps = sorted({int(step) for part in parts for step in part} - {-1})
        self._carried = [name_of(step) for step in steps]

    def take_over(self) -> None:
        """Upload what was agreed on. Local."""
        carried, self._carried = self._carried, []
        for name in carried:
            self.upload(name)

    def results(self) -> list[UploadResult]:
        """The uploads that have ended since the last call."""
        return self._uploader.results() if self._uploader is not None else []

    def wait(self) -> None:
        """Wait for the queued uploads."""
        if self._uploader is not None:
            self._uploader.wait()

    def abort(self, reason: str) -> None:
        """Give up the uploads under way, queued and to come. From any thread; never blocks.

        They stay `pending`, for the tier that follows after a change of ranks.
        """
        self._is_aborted = True
        if self._uploader is not None:
            self._uploader.abort(reason)
