"""The checkpoints of one rank's run, in memory, on disk and at a URL, and the way to resume."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import msgspec
import torch
from torch.distributed import Store

from holdfast.checkpoint import CheckpointManager, ManagerSettings
from holdfast.checkpoint.format import VALIDATION, WritePlan
from holdfast.checkpoint.loading import LoadStatistics
from holdfast.checkpoint.saving import Members, SaveJob, SaveResult, make_write_plan, numbered
from holdfast.checkpoint.stores import LocalStore, Retention, open_store
from holdfast.checkpoint.tiers import RemoteTier, UploadResult
from holdfast.parallel.comm import Communicator, separate_group
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.trainer.config import anchored
from holdfast.trainer.run import (
    CERTIFICATE,
    FINGERPRINT,
    RunDirectory,
    Signals,
    best_rule,
    checkpoint_root,
    forget_newer,
    memory_root,
    set_aside_newer,
)
from holdfast.trainer.saves.checkpoint_loading import CheckpointLoading, recent_to_data
from holdfast.trainer.saves.save_policy import SaveDecision, SavePolicy, SaveProgress
from holdfast.trainer.step import (
    Outcome,
    Requests,
    Training,
    huggingface_files,
    renumbered,
    saved_tensors,
    state_format,
)
from holdfast.trainer.terms import (
    make_certificate,
    software_versions,
)
from holdfast.trainer.worlds import WorldInfo

_T = TypeVar("_T")
logger = logging.getLogger("holdfast.checkpoint")

_SETTLE_S = 0.2
"""How long a change of ranks waits for the end of a save that it has given up, in seconds."""


class Checkpoints:
    """The checkpoints of one rank's run. All ranks call every method at the same step.

    It connects the run's state, policy and folders with saving and loading (`CheckpointManager`)
    and uploading (`RemoteTier`): hence its many attributes.
    """

    def __init__(
        self,
        training: Training,
        world: WorldInfo,
        store: Store,
        run: RunDirectory,
        machines: Sequence[str],
        signals: Signals,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Nothing is opened before the first save or load.

        Args:
            store: the rendezvous store of this generation.
            machines: the machine of each participating rank, in ascending order of ranks.
            clock: the seconds since some fixed moment, for saves that are due by time.
        """
        config = training.config.checkpoint
        if config.memory_every and len(set(machines)) > 1:
            raise ConfigError(
                f"checkpoint.memory_every = {config.memory_every}: copies in shared memory are for "
                f"runs on one machine, and this one is on {len(set(machines))} (a container counts "
                "as one); set it to 0"
            )
        self._training, self._run, self._signals, self._clock = training, run, signals, clock
        self._state = training.state()
        self._certificate = make_certificate(training.config, training.device)
        # The participating ranks are numbered from 0 here.
        self._ranks = training.plan.stage_replicas.ranks
        generation = training.plan.generation
        members = Members(
            self._ranks.index(world.rank),
            numbered(machines),
            store,
            generation,
            numbers=self._ranks,
        )
        settings = ManagerSettings(config.arena_mib << 20, config.timeout_s, config.verify)
        # It refers to no training: one that is replaced leaves memory with its checkpoints.
        name = f"g{generation}/join"
        parts = training.plan.configured_mesh.parts
        join = partial(_join_group, members, parts, world.store_host, name, settings.timeout_s)
        self._manager = CheckpointManager(members, settings, make_join=join)
        self._earlier: list[CheckpointManager] = []
        """The managers of earlier generations whose last save still waits for its disk."""
        self._untold: list[SaveResult | UploadResult] = []
        """The results of earlier generations that `results` has not returned yet."""
        self._disk = LocalStore(checkpoint_root(run.root, training.config))
        self._remote: RemoteTier | None = None
        if config.url:
            target, every, keep = open_store(config.url), config.remote_every, config.remote_keep
            best = best_rule(training.config)
            self._remote = RemoteTier(
                self._disk, target, members, every=every, keep=keep, best=best
            )
        self._policy = SavePolicy.of(training.config)
        self._progress = SaveProgress(saved_s=clock())
        self._evaluated: tuple[int, Mapping[str, float]] = (-1, {})
        """A step, and the losses of validation sets after it."""
        self._plan: WritePlan | None = None
        self.loaded: LoadStatistics | None = None
        """The statistics of the load, if the run was resumed."""

    @property
    def committed_step(self) -> int:
        """The newest step known to be on the disk; -1: none."""
        return self._progress.committed_step

    @property
    def _is_first(self) -> bool:
        return self._manager.members.rank == 0

    @property
    def _coordinates(self) -> bool:
        members = self._manager.members
        return members.rank == members.coordinator

    @property
    def plan(self) -> WritePlan:
        """The write plan; made once and kept while the layout stands."""
        if self._plan is None:
            training = self._training
            tensors = saved_tensors(
                training.plan,
                state_format(training.config),
                from_shadows=training.saves_from_shadows,
            )
            nodes = self._manager.members.nodes
            self._plan = make_write_plan(renumbered(tensors, self._ranks), nodes)
        return self._plan

    def requests(self) -> Requests:
        """The requests of this rank for the vote."""
        progress, now_s = self._progress, self._clock()
        overdue = self._policy.is_overdue(now_s, progress.saved_s, progress.failed_s)
        overdue = overdue and self._is_first
        return Requests(
            save=self._signals.save or overdue,
            stop=self._signals.stop,
            interrupt=self._signals.interrupt,
            busy=self._manager.busy,
            rewind=self._is_first and self._can_rewind and self._run.rewind_request.exists(),
        )

    def take_rewind(self, take: Callable[[Path], _T]) -> _T | None:
        """What `take` reads of a person's request to take steps back, on the first rank."""
        return take(self._run.rewind_request) if self._is_first else None

    @property
    def _can_rewind(self) -> bool:
        return self._training.config.elastic.rewind > 0

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """Take the losses of validation sets after `step` steps, which its checkpoint tells."""
        self._evaluated = (step, losses)

    def after_step(self, step: int, outcome: Outcome) -> bool:
        """Begin a save if one is due after `step` steps. Returns whether one was skipped."""
        asked = outcome.requests
        if asked.save and not asked.stop:
            self._signals.save = False
        decision = self._policy.decide(
            step,
            asked=asked.save or self._progress.is_owed,
            stopping=asked.stop,
            busy=asked.busy,
        )
        if decision in (SaveDecision.DISK, SaveDecision.MEMORY):
            self.save(step, in_memory=decision is SaveDecision.MEMORY)
        return decision is SaveDecision.SKIPPED

    def save(self, step: int, *, in_memory: bool = False) -> None:
        """Begin to save the state after `step` steps; waits for the last save."""
        if step == self._progress.saved_step and not in_memory:
            return
        if not in_memory:
            self._progress.saved_step, self._progress.is_owed = step, False
        self._training.finish_gather()  # a rank writes parameters of other owners, too
        with self._saving():
            self._manager.save(self._job(step, in_memory=in_memory))
        if not in_memory:
            self._progress.saved_s, self._progress.failed_s = self._clock(), None
        self._training.protect(self._fence)

    def _saving(self) -> AbstractContextManager[None]:
        """The mark of this rank's waits for its saves, each as long as a save may take."""
        return self._training.groups.recorder.busy("save", self._manager.longest_wait_s)

    def _fence(self, number: int) -> int:
        with self._saving():
            return self._manager.fence(number)

    def _job(self, step: int, *, in_memory: bool) -> SaveJob:
        training, config = self._training, self._training.config
        keep = config.checkpoint.memory_keep if in_memory else config.checkpoint.keep
        return SaveJob(
            step=step,
            store=self._memory() if in_memory else self._disk,
            tier="memory" if in_memory else "disk",
            plan=self.plan,
            source=self._state.source,
            before=self._state.before,
            scalars={
                "step": step,
                "optimizer_step": training.optimizer.step,
                "samples": config.train.samples_before(step),
                "tokens": config.train.samples_before(step) * config.train.seq_len,
                "seed": config.train.seed,
                FINGERPRINT: training.data.fingerprint,
                CERTIFICATE: json.dumps(self._certificate),
                **recent_to_data(training.progress.recent),
                **self._losses_of(step),
            },
            config=msgspec.to_builtins(anchored(config)),
            versions=software_versions(),
            extra_files=huggingface_files(config) if self._coordinates else {},
            retention=Retention(keep, self._uploading, None if in_memory else best_rule(config)),
            pinned=training.device.type == "cuda",
        )

    def _losses_of(self, step: int) -> dict[str, Any]:
        """The scalars of a manifest for the losses of validation sets; none without these."""
        evaluated, losses = self._evaluated
        return {VALIDATION: dict(losses)} if step == evaluated and losses else {}

    def _memory(self) -> LocalStore:
        """The run's copies in shared memory."""
        root = memory_root(self._run.root)
        if root is None:
            raise ConfigError(f"{self._run.root} has no identity.json; start the run again")
        return LocalStore(root)

    def _uploading(self) -> set[str]:
        return self._remote.pending if self._remote is not None else set()

    def results(self) -> list[SaveResult | UploadResult]:
        """The saves and uploads that have ended since the last call."""
        found, self._untold = self._untold, []
        for result in (*self._results_of_earlier(), *self._manager.results()):
            found.append(result)
            if result.error:
                logger.warning("checkpoint of step %d failed: %s", result.step, result.error)
                if result.tier == "disk":
                    self._progress.failed_s = self._clock()
            elif result.tier == "disk" and result.path is not None:
                self._progress.committed_step = result.step
                if self._remote is not None:
                    self._remote.committed(result.path.name)
        if self._remote is not None:
            found += self._remote.results()
        return found

    def _results_of_earlier(self) -> list[SaveResult]:
        """The results of saves that were given up, as their disk lets go of them."""
        found: list[SaveResult] = []
        for manager in tuple(self._earlier):
            ended = not manager.busy
            found += manager.results()
            if ended:
                manager.close()
                self._earlier.remove(manager)
        return found

    def finish(self) -> list[SaveResult | UploadResult]:
        """Wait for all saves and uploads. Returns their results."""
        with self._saving():
            self._manager.finish()
        found = self.results()
        if self._remote is not None:
            with self._saving():
                self._remote.wait()
            found += self.results()
        return found

    def settle(self, step: int, *, over: bool) -> tuple[bool, bool]:
        """Agree whether `step` is on the disk; if not, the next `save` of it tries again.

        Collective.

        Args:
            over: whether there is no time left for that; the first rank's answer counts.
        Returns:
            Whether it is, and whether the time is over.
        """
        progress, is_over = self._progress, over and self._is_first
        agreed = torch.tensor([progress.committed_step, is_over], dtype=torch.float64)
        self._training.groups.control.all_reduce(agreed, "max").wait()
        progress.committed_step = int(agreed[0])
        if progress.committed_step != step:
            progress.saved_step = -1
        return progress.committed_step == step, bool(agreed[1])

    def go_back(self, step: int) -> list[SaveResult | UploadResult]:
        """Set the saves of later steps aside, which the run takes another way to. Collective.

        Returns:
            The results of saves that were under way.
        """
        results = self.finish()
        self.forget_after(step)
        return results

    def forget_after(self, step: int) -> None:
        """Set the saves of later steps aside, of which none is under way. On every rank."""
        progress = self._progress
        if progress.committed_step > step or progress.saved_step > step:
            # What is left on the disk may be old.
            progress.committed_step = progress.saved_step = -1
            progress.is_owed = True
        if self._is_first:
            set_aside_newer(self._disk.root, step)
            forget_newer(self._run.root, step)

    def forget_memory(self) -> None:
        """Remove the copies in memory, once the run's last step is on the disk."""
        root = memory_root(self._run.root)
        if self._is_first and root is not None:
            shutil.rmtree(root, ignore_errors=True)

    def agree(self, before: Checkpoints | None, *, continued: bool) -> None:
        """Agree on the newest committed step in a change of the ranks. Collective.

        They also agree on the coordinator of the saves: the first rank whose disk holds no save
        that was given up; on what is still to be uploaded; and on whether a save that was given up
        is owed, since the run has no newer one. The change may begin again after it: `before` stays
        as it is.

        Args:
            before: the checkpoints of this rank before the change; None if it has just joined.
            continued: whether the run goes on from live state, and not from a checkpoint.
        """
        progress, control = self._progress, self._training.groups.control
        known = begun = progress.committed_step
        if before is not None:
            # It may have committed what it then was told to give up: that counts.
            before._manager.settle(_SETTLE_S)
            before._untold = before.results()
            self._earlier = [*before._earlier, before._manager]
        if before is not None and continued:
            known = max(known, before.committed_step)
            begun = before._progress.saved_step
            progress.saved_s = before._progress.saved_s
        members = self._manager.members
        rank = members.size if any(manager.busy for manager in self._earlier) else members.rank
        owed = before is not None and continued and before._progress.is_owed
        mine = [float(known), -float(rank), float(begun), float(owed)]
        agreed = torch.tensor(mine, dtype=torch.float64)
        control.all_reduce(agreed, "max").wait()
        progress.committed_step = progress.saved_step = int(agreed[0])
        progress.is_owed = int(agreed[2]) > progress.committed_step or bool(agreed[3])
        self._manager.lead(-int(agreed[1]) % members.size)
        if self._remote is not None:
            kept = before._remote if before is not None and continued else None
            self._remote.agree(kept, control)

    def take_over(self, before: Checkpoints | None) -> None:
        """Go on for the checkpoints before a change that stands. Local."""
        if before is not None:
            self._untold = before.results()
        if self._remote is not None:
            self._remote.take_over()

    def abort(self, reason: str) -> None:
        """Give up the save under way: fences open at once. From any thread; never blocks."""
        self._manager.abort(reason)

    def cancel(self, reason: str) -> None:
        """Give up all saves and uploads. Local; never blocks.

        Committed checkpoints stay. A save that waits for its disk ends when the disk lets it; it is
        not committed then.
        """
        self._training.protect(None)
        self._manager.abort(reason)
        if self._remote is not None:
            self._remote.abort(reason)

    def close(self) -> None:
        """Release threads, files and memory. Local."""
        self._training.protect(None)
        if not self._manager.busy:
            self._manager.close()

    def resume(self, note: Callable[[str], None]) -> int:
        """Load the best readable checkpoint. Returns its step, 0 if there is none.

        A damaged checkpoint is skipped for the one before it, on every rank alike.

        Raises:
            CheckpointError: there are checkpoints, but none can be read.
        """
        reason = ""
        loading = CheckpointLoading(
            self._training, self._state, self._manager, self._run, self._certificate
        )
        for number, place in enumerate(self._run.resume.candidates):
            step, reason = loading.attempt(place, f"resume-{number}", note)
            self.loaded = loading.statistics
            if reason:
                note(f"{place} is passed over: {reason}")
                continue
            here = Path(place).parent == self._disk.root.absolute()
            # What was loaded from elsewhere, such as memory, is not on this run's disk.
            self._progress.saved_step = self._progress.committed_step = step if here else -1
            if self._is_first:
                for moved in set_aside_newer(self._disk.root, step):
                    note(f"{moved}: a checkpoint of steps that the run now repeats, set aside")
                for name in forget_newer(self._run.root, step):
                    note(f"{name} in memory: a copy of steps that the run now repeats, removed")
            if self._remote is not None and here:
                self._remote.upload_missing(Path(place).name, self._training.groups.control)
            return step
        if self._run.resume.candidates:
            raise CheckpointError(
                f"no checkpoint of this run can be read; the last reason: {reason}"
            )
        if self._is_first:
            for name in forget_newer(self._run.root, 0):
                note(f"{name} in memory: a copy of steps that the run now repeats, removed")
        return 0


def _join_group(
    members: Members, parts: int, host: str, name: str, timeout_s: float
) -> Communicator | None:
    """A second communicator of all ranks, for weights split along columns. Local.

    Ranks of different replicas may save one tensor's columns, as shadows or as keepers.
    """
    if parts == 1 or members.size == 1:
        return None
    ranks = range(members.size)
    return separate_group(members.store, host, name, ranks, members.rank, timeout_s=timeout_s)
