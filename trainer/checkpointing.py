"""When a run saves, and what: the checkpoints of one rank, in memory, on disk and at a URL."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import monotonic, perf_counter
from types import FrameType
from typing import Any

import msgspec
import torch
from torch.distributed import Store

from holdfast.checkpoint.format import Manifest, WritePlan, directory
from holdfast.checkpoint.loading import (
    ByteReader,
    FolderReader,
    LoadStatistics,
    check_coverage,
    load,
)
from holdfast.checkpoint.saving import SaveJob, Saver, SaveResult, make_write_plan
from holdfast.checkpoint.stores import RemoteStore, Uploader, UploadResult
from holdfast.checkpoint.tools import check_small_parts
from holdfast.parallel.comm import GlooCommunicator, gloo_device
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.trainer.run import (
    RunDirectory,
    checkpoint_root,
    has_state,
    memory_root,
    set_aside_newer,
)
from holdfast.trainer.step import (
    Outcome,
    Requests,
    Training,
    huggingface_files,
    renumbered,
    saved_tensors,
    wanted_boxes,
    weights_only,
)
from holdfast.trainer.world import WorldInfo

logger = logging.getLogger("holdfast.checkpoint")

_LARGEST_ARENA_MIB = 2048
_CARRIED_UPLOADS = 8
"""Checkpoints whose upload is begun again when the ranks change; older ones would be removed anyway soon."""
_PATIENCE_S = 10.0
"""How much longer than a save's deadline its end is waited for."""


class Signals:
    """SIGUSR1 asks for a save, SIGTERM for a save and the end; both at the end of a step."""

    def __init__(self) -> None:
        self.save = False
        self.stop = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals; only the main thread of a process can."""

        def asked(number: int, _: FrameType | None) -> None:
            if number == signal.SIGTERM:
                self.stop = True
            self.save = True

        for number in (signal.SIGUSR1, signal.SIGTERM):
            self._before[number] = signal.signal(number, asked)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class Checkpoints:
    """The checkpoints of one rank's run. Every method is called by all ranks at the same step."""

    def __init__(
        self,
        training: Training,
        world: WorldInfo,
        store: Store,
        run: RunDirectory,
        nodes: tuple[int, ...],
        signals: Signals,
    ) -> None:
        """Args:
        nodes: the node of each rank that takes part, in ascending order of these.
        """
        self._training, self._world, self._run, self._nodes = training, world, run, nodes
        self._ranks = training.plan.stage_replicas.ranks
        self._index = self._ranks.index(world.rank)
        """Among the ranks that take part, which are what the checkpointer counts."""
        self._config = training.config.checkpoint
        if self._config.memory_every and len(set(nodes)) > 1:
            raise ConfigError(
                f"checkpoint.memory_every = {self._config.memory_every}: copies in shared memory are for runs "
                f"on one machine, and this one is on {len(set(nodes))}; set it to 0"
            )
        self._store = store
        self._signals = signals
        self._state = training.state()
        self._plan: WritePlan | None = None
        self._saver: Saver | None = None
        self._uploader: Uploader | None = None
        self._uploading: set[Path] = set()
        self._uploaded: set[tuple[str, str]] = set()
        """(checkpoint, file) that this rank has sent to the URL."""
        self._root = checkpoint_root(run.root, training.config)
        self._saved_step = -1
        self.committed_step = -1
        """The newest step that is known to be on the disk."""
        self._local_saves = 0
        self._last_save_at = monotonic()
        self.loaded: LoadStatistics | None = None
        """What loading took, where the run was resumed."""
        self.wait_s = 0.0
        """Time that steps waited for the save before theirs, under the policy "wait"."""

    @property
    def plan(self) -> WritePlan:
        """Who writes what; made once while the layout stands."""
        if self._plan is None:
            training = self._training
            tensors = saved_tensors(
                training.plan,
                training.config.train.precision,
                from_shadows=training.saves_from_shadows,
            )
            self._plan = make_write_plan(renumbered(tensors, self._ranks), self._nodes)
        return self._plan

    def requests(self) -> Requests:
        """What this rank asks for at the vote."""
        overdue = (
            self._config.every_seconds > 0
            and self._index == 0
            and monotonic() - self._last_save_at >= self._config.every_seconds
        )
        busy = self._saver is not None and self._saver.busy
        return Requests(save=self._signals.save or overdue, stop=self._signals.stop, busy=busy)

    def after_step(self, step: int, outcome: Outcome) -> bool:
        """Begin a save if one is due after `step` steps; returns whether one was left out as too soon."""
        config, asked = self._config, outcome.requests
        due = asked.save or asked.stop or (config.every > 0 and step % config.every == 0)
        in_memory = config.memory_every > 0 and step % config.memory_every == 0
        if asked.save and not asked.stop:
            self._signals.save = False
        if not due and not in_memory:
            return False
        if asked.busy and config.policy == "skip" and not (asked.save or asked.stop):
            # The last step is saved in any case.
            return step < self._training.config.train.steps
        self.save(step, in_memory=not due)
        return False

    def save(self, step: int, *, in_memory: bool = False) -> None:
        """Begin to save the state after `step` steps; waits for the save before."""
        if step == self._saved_step and not in_memory:
            return
        saver = self._open_saver()
        began = perf_counter()
        saver.wait(self._config.timeout_s + _PATIENCE_S)
        self.wait_s += perf_counter() - began
        training, config = self._training, self._training.config
        if not in_memory:
            self._saved_step = step
            self._last_save_at = monotonic()
        saver.start(
            SaveJob(
                step=step,
                root=memory_root(self._run.root) if in_memory else self._root,
                tier="memory" if in_memory else "disk",
                plan=self.plan,
                source=self._state.source,
                before=self._state.before,
                scalars={
                    "step": step,
                    "optimizer_step": training.optimizer.step,
                    "samples": step * config.train.global_batch,
                    "tokens": step * training.step_tokens,
                    "seed": config.train.seed,
                    "data_fingerprint": training.data.fingerprint,
                },
                config=msgspec.to_builtins(config),
                versions={"holdfast": version("holdfast"), "torch": str(torch.__version__)},
                extra_files=huggingface_files(config) if self._index == 0 else {},
                keep=self._config.memory_keep if in_memory else self._config.keep,
                protected=self._uploading_now,
            )
        )
        training.protect(saver.fence)

    def _uploading_now(self) -> set[Path]:
        return set(self._uploading)

    def _open_saver(self) -> Saver:
        if self._saver is not None:
            return self._saver
        share = self.plan.written_bytes().get(self._index, 0)
        mib = self._config.arena_mib or min(_LARGEST_ARENA_MIB, -(-share >> 20) + 16)
        group = self._training.groups.tensor
        join = None
        if group.size > 1:
            name = f"g{self._training.plan.generation}/join/{group.ranks[0]}"
            join = GlooCommunicator(
                self._store,
                name,
                [self._ranks.index(rank) for rank in group.ranks],
                self._index,
                device=gloo_device(self._world.store_host),
                timeout_s=self._config.timeout_s,
            )
        self._saver = Saver(
            self._index,
            self._nodes,
            self._store,
            arena_bytes=mib << 20,
            timeout_s=self._config.timeout_s,
            join=join,
            pinned=self._training.device.type == "cuda",
        )
        return self._saver

    def results(self) -> list[SaveResult | UploadResult]:
        """Saves and uploads that have ended since the last call."""
        found: list[SaveResult | UploadResult] = []
        for result in self._saver.results() if self._saver is not None else []:
            found.append(result)
            if result.error:
                logger.warning("checkpoint of step %d failed: %s", result.step, result.error)
            elif result.tier == "disk" and result.path is not None:
                self.committed_step = result.step
                self._upload(result.path)
        if self._uploader is not None:
            found += self._uploader.results()
        return found

    def _upload(self, path: Path) -> None:
        """Queue a local checkpoint for the URL. Every rank counts the same commits."""
        self._local_saves += 1
        if self._config.url and (self._local_saves - 1) % self._config.remote_every == 0:
            self._start_upload(path)

    def _start_upload(self, path: Path) -> None:
        if self._uploader is None:
            self._uploader = Uploader(
                self._config.url,
                self._index,
                len(self._ranks),
                self._store,
                keep=self._config.remote_keep,
                finished=self._uploading.discard,
                uploaded=self._uploaded,
            )
        self._uploading.add(path)
        self._uploader.start(path)

    def finish(self) -> list[SaveResult | UploadResult]:
        """Wait for what is being saved and uploaded; returns how it ended."""
        if self._saver is not None:
            self._saver.wait(self._config.timeout_s + _PATIENCE_S)
        found = self.results()
        if self._uploader is not None:
            self._uploader.wait()
            found += self.results()
        return found

    def forget_memory(self) -> None:
        """Give back what the memory tier has; for a run whose last step is on the disk."""
        if self._index == 0:
            shutil.rmtree(memory_root(self._run.root), ignore_errors=True)

    def go_on_from(self, before: Checkpoints | None) -> None:
        """Take over from the ranks of before what the newest committed step is. Collective."""
        known = self.committed_step
        if before is not None:
            before.results()
            known = max(known, before.committed_step)
            self._last_save_at = before._last_save_at
        newest = torch.tensor([float(known)], dtype=torch.float64)
        self._training.groups.control.all_reduce(newest, "max").wait()
        self.committed_step = self._saved_step = int(newest.item())
        if self._config.url:
            self._go_on_uploading(before)

    def _go_on_uploading(self, before: Checkpoints | None) -> None:
        """Upload what the ranks of before had not uploaded yet. Collective."""
        waiting: list[int] = []
        if before is not None:
            self._uploaded |= before._uploaded
            steps = (directory.step_of(path) for path in set(before._uploading))
            waiting = sorted(step for step in steps if step is not None)[-_CARRIED_UPLOADS:]
        mine = torch.full((_CARRIED_UPLOADS,), -1, dtype=torch.int64)
        mine[: len(waiting)] = torch.tensor(waiting, dtype=torch.int64)
        control = self._training.groups.control
        parts = [torch.empty_like(mine) for _ in range(control.size)]
        control.all_gather(parts, mine).wait()
        for step in sorted({int(step) for part in parts for step in part} - {-1}):
            self._start_upload(self._root / directory.name_of(step))

    def abort(self, reason: str) -> None:
        """Give up the save under way: fences open at once. From any thread; never blocks."""
        if self._saver is not None:
            self._saver.abort(reason)

    def cancel(self, reason: str) -> None:
        """Give up what is under way, and return once nothing reads the training's state. Local.

        What is committed stays.
        """
        self._training.protect(None)
        if self._saver is not None:
            self._saver.cancel(reason)
        if self._uploader is not None:
            self._uploader.abort()

    def close(self) -> None:
        """Release threads, files and memory. Local."""
        self._training.protect(None)
        if self._saver is not None and not self._saver.busy:
            self._saver.close()

    def resume(self, note: Callable[[str], None]) -> int:
        """Load the best checkpoint that can be read; returns the step to go on with, 0 if there is none.

        A damaged one is passed over for the one before, on every rank alike.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        reason = ""
        for number, place in enumerate(self._run.resume.candidates):
            step, reason = self._try(place, number)
            if reason:
                note(f"{place} is passed over: {reason}")
                continue
            self._saved_step = self.committed_step = step
            if self._index == 0:
                for moved in set_aside_newer(self._root, step):
                    note(f"{moved.name}: a checkpoint of steps that the run now repeats, set aside")
            self._upload_missing(place)
            return step
        if self._run.resume.candidates:
            raise CheckpointError(
                f"no checkpoint of this run can be read; the last reason: {reason}"
            )
        return 0

    def _upload_missing(self, place: str) -> None:
        """Send a local checkpoint to the URL where it is not there yet: its run ended before it could."""
        if not self._config.url or "://" in place:
            return
        path = Path(place)
        missing = torch.zeros(1, dtype=torch.float64)
        if self._index == 0 and path.parent == self._root.absolute():
            # A store that does not answer now, in whatever way, is asked again while uploading.
            try:
                missing += path.name not in RemoteStore(self._config.url).names()
            except Exception as error:
                logger.warning("%s does not answer: %s", self._config.url, error)
                missing += 1
        self._training.groups.control.all_reduce(missing).wait()
        if missing.item():
            self._start_upload(path)

    def _try(self, place: str, number: int) -> tuple[int, str]:
        """Load from one place: (the step it was saved after, why it cannot be used on any rank)."""
        step, mine = 0, ""
        try:
            step = self._load(place, f"resume-{number}")
        except CheckpointError as error:
            mine = str(error)
        failed = torch.tensor([float(bool(mine))], dtype=torch.float64)
        self._training.groups.control.all_reduce(failed).wait()
        if failed.item():
            return step, mine or "another rank could not read it"
        return step, ""

    def _load(self, place: str, name: str) -> int:
        manifest, reader = open_checkpoint(place)
        training, rank = self._training, self._index
        precision = training.config.train.precision
        try:
            check_coverage(manifest, place)
            here = [r for r, node in enumerate(self._nodes) if node == self._nodes[rank]]
            files = list(manifest.files)[here.index(rank) :: len(here)]
            check_small_parts(manifest, reader, files)
            wanted = {
                peer: wanted_boxes(training.plan, self._ranks[peer], precision) for peer in here
            }
            targets = self._state.targets()
            if not has_state(manifest):
                wanted = {peer: weights_only(boxes, manifest) for peer, boxes in wanted.items()}
                targets = weights_only(targets, manifest)
            self.loaded = load(
                manifest,
                reader,
                targets,
                wanted,
                rank,
                store=self._store,
                name=name,
                verify=self._config.verify,
                timeout_s=self._config.timeout_s,
                check=training.groups.signal.check,
                where=place,
            )
        finally:
            reader.close()
        self._check_data(manifest, place)
        if not has_state(manifest):
            training.optimizer.restart()
            return 0
        training.optimizer.restore(int(manifest.scalars.get("optimizer_step", manifest.step)))
        return manifest.step

    def _check_data(self, manifest: Manifest, place: str) -> None:
        saved = manifest.scalars.get("data_fingerprint")
        now = self._training.data.fingerprint
        if saved in (None, now) or self._run.resume.allow_change:
            return
        raise ConfigError(
            f"{place} was trained on other data: its fingerprint is {saved}, that of [data] now is {now}; "
            "bring the files back, start over with --resume none, or go on with --allow-change"
        )


def open_checkpoint(place: str) -> tuple[Manifest, ByteReader]:
    """The manifest of a checkpoint folder or URL, and what reads its bytes.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    if "://" in place:
        url, _, name = place.rpartition("/")
        remote = RemoteStore(url)
        return remote.manifest(name), remote.reader(name)
    return directory.read_manifest(Path(place)), FolderReader(Path(place))
