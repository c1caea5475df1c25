"""Checkpoints for any torch program without the trainer: modules, DDP, FSDP2 and DTensors.

checkpointer = Checkpointer("checkpoints", {"model": model, "optimizer": optimizer})
step = checkpointer.load() or 0
...
optimizer.step()
checkpointer.save(step)          # returns once the state is copied; the disk comes later
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    HashStore,
    PrefixStore,
    Store,
    get_rank,
    get_world_size,
    is_available,
    is_initialized,
)
from torch.distributed.distributed_c10d import _get_default_store

from holdfast.checkpoint.format import (
    STATE,
    STATE_VERSION,
    Manifest,
    SavedTensor,
    WritePlan,
    local_path,
    name_of,
    step_of,
)
from holdfast.checkpoint.loading import LoadStatistics, Targets, boxes_of
from holdfast.checkpoint.manager import CheckpointManager, ManagerSettings, Wanted
from holdfast.checkpoint.program import (
    Agreement,
    Meeting,
    ProgramState,
    ProgramTensor,
    Restore,
    Staging,
)
from holdfast.checkpoint.saving import Members, SaveJob, SaveResult, make_write_plan, numbered
from holdfast.checkpoint.stores import (
    LocalStore,
    Retention,
    checkpoint_at,
    find_checkpoint,
    newest,
)
from holdfast.parallel.errors import CheckpointError, number_fault
from holdfast.parallel.files import machine_identity
from holdfast.parallel.layout import Box

_ARENA_BYTES = 128 << 20
"""Host memory between the copy of the state and the disk."""
_MOST_STEPS = 10**15
_log = logging.getLogger("holdfast")


class Checkpointer:
    """Saves and loads a program's state. All ranks of the default process group make and call it.

    `save` copies this rank's part of the state to host memory and returns; the disk is written
    meanwhile. So the checkpoint has what was there when `save` was called, whatever the program
    changes afterwards, and however. Everything that a value has is saved exactly, or `save` refuses
    on all ranks and names it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        state: ProgramState,
        *,
        keep: int = 3,
        arena_bytes: int = 0,
        timeout_s: float = 600.0,
    ) -> None:
        """Prepare to save to a folder. Collective over the default process group.

        Args:
            folder: the folder of checkpoints; on several machines, one that all of them see.
                No URL: `load` alone reads from those.
            state: the values to save, by key, read at each save: modules ("model" keeps its own
                names), optimizers, schedulers and other objects with state_dict, tensors, numpy
                arrays, generators, and numbers, text, lists, tuples, sets and dicts of these.
            keep: the number of newest checkpoints that stay; 0: all.
            arena_bytes: host memory between the copy of the state and the disk; 0: 128 MiB.
            timeout_s: the time after which a save is given up, in seconds.
        Raises:
            CheckpointError: an option is out of its range.
            ConfigError: the folder is a URL.
        """
        _check(number_fault("keep", keep, 0))
        _check(number_fault("arena_bytes", arena_bytes, 0))
        _check(number_fault("timeout_s", timeout_s, 0.001, whole=False))
        self.folder = local_path(os.fspath(folder), "folder")
        self.state = state
        self._keep = keep
        rank, size, store = _world()
        # The store does the counting, so that earlier groups of this process do not count.
        number = store.add(f"holdfast/checkpointers/{rank}", 1)
        here = PrefixStore(f"holdfast/{number}", store)
        self._meeting = Meeting(rank, size, here, timeout_s)
        machines = self._meeting.exchange("machine", machine_identity())
        members = Members(rank, numbered(machines), here)
        settings = ManagerSettings(arena_bytes or _ARENA_BYTES, timeout_s)
        self._manager = CheckpointManager(members, settings)
        self._is_closed = False
        self._agreement = Agreement(self._meeting)
        self._staging = Staging()
        self._plan: tuple[Sequence[SavedTensor], WritePlan] | None = None
        self._ended = _Ended()

    def save(self, step: int, *, wait: bool = False) -> None:
        """Save the present state; a save under way is finished first. Collective.

        Returns once this rank's part is copied to host memory.

        Args:
            step: the number of steps done; it names the checkpoint.
            wait: return only once the checkpoint is committed; raise CheckpointError if the save
                fails.
        Raises:
            CheckpointError: on every rank, before anything is written: a leaf of the state cannot
                be saved exactly, or differs between ranks where it must not.
        """
        _check(number_fault("step", step, 0, _MOST_STEPS))
        manager = self._open_manager()
        # The copies in host memory are those of the save under way until it ends.
        is_free = manager.finish()
        self._ended.add(manager.results())
        facts = {"step": step} if is_free else {"the save before": "still under way"}
        with self._meeting.in_turn():
            agreed = self._agreement.reach(self.state, facts)
            plan = self._plan_of(agreed.tensors, manager)
        if not is_free:
            raise CheckpointError(f"step {step} is not saved: the save before is still under way")
        held = {entry.name: entry for entry in agreed.mine}
        pieces = plan.written_by(self._meeting.rank)
        source = self._staging.take(pieces, lambda name, box: _view(held[name], box))
        manager.save(
            SaveJob(
                step=step,
                store=LocalStore(self.folder),
                tier="disk",
                plan=plan,
                source=source,
                scalars={"step": step, STATE_VERSION: 2, STATE: agreed.docs},
                versions={"holdfast": version("holdfast"), "torch": str(torch.__version__)},
                retention=Retention(self._keep),
            )
        )
        if wait:
            self.wait()

    def load(self, step: int | None = None, *, allow: Sequence[str] = ()) -> int | None:
        """Load the newest checkpoint, or that of `step`, into the state. Collective.

        Args:
            step: the checkpoint's number of steps; None: the newest checkpoint.
            allow: names that the checkpoint, or a module of the state, may lack, as the refusal
                gives them; `*` stands for any text. They stay as they are, or are left out.
        Returns:
            The step of the checkpoint; None if there is no checkpoint. `loaded` has the plain
            values, tensors among them.
        Raises:
            CheckpointError: the checkpoint is damaged or incomplete, lacks something that the
                state has, or has something for a key that the state has no place for.
        """
        if step is not None:
            _check(number_fault("step", step, 0, _MOST_STEPS))
        store = LocalStore(self.folder)

        def choose() -> str:
            if self._meeting.rank:
                return ""
            return store.place_of(name_of(step)) if step is not None else _newest_of(store)

        with self._meeting.in_turn():
            return self._load_agreed(choose, allow)

    def results(self) -> list[SaveResult]:
        """The saves that have ended since the last call, with times and errors. Local."""
        self._ended.add(self._manager.results())
        return self._ended.take()

    def wait(self) -> None:
        """Wait until the save under way is committed. Raises CheckpointError if it failed."""
        manager = self._open_manager()
        manager.wait()
        self._ended.add(manager.results(), quiet=True)
        self._ended.raise_failure()

    def close(self) -> None:
        """Finish the save under way, release files and memory. No save follows.

        Raises:
            CheckpointError: the last save failed, and nothing has raised for it yet.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._manager.wait()
        self._ended.add(self._manager.results(), quiet=True)
        self._manager.close()
        self._staging = Staging()
        self._ended.raise_failure()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            _log.warning("%s", error)

    loaded: Mapping[str, Any] = {}
    """The plain values of the last load, by their keys."""
    load_statistics: LoadStatistics | None = None
    """What the last load read, and how long it took, on this rank."""

    def _open_manager(self) -> CheckpointManager:
        if self._is_closed:
            raise CheckpointError("this Checkpointer is closed; make another one")
        return self._manager

    def _plan_of(self, tensors: Sequence[SavedTensor], manager: CheckpointManager) -> WritePlan:
        """The write plan; reused while names, shapes and boxes stay the same."""
        if self._plan is None or self._plan[0] is not tensors:
            self._plan = tensors, make_write_plan(tensors, manager.members.nodes)
        return self._plan[1]

    def _load_agreed(self, choose: Any, allow: Sequence[str]) -> int | None:
        """Load the checkpoint at the place that rank 0 chooses; none for an empty one."""
        manager = self._open_manager()
        places = self._meeting.agree("choice", choose, lambda place: place)[1]
        if not places[0]:
            return None
        checkpoint = checkpoint_at(places[0])
        restores: list[Restore] = []
        allow = [allow] if isinstance(allow, str) else list(allow)

        def prepare(manifest: Manifest) -> tuple[Targets, Wanted]:
            restores.append(self._prepared(manifest, allow))
            return restores[0].targets, self._wanted(restores[0].targets, manager.members)

        name = f"{self._meeting.exchanges}"
        manifest, self.load_statistics = manager.load(checkpoint, name, prepare)
        restores[0].finish()
        self.loaded = restores[0].loaded
        found = step_of(checkpoint.name)
        return found if found is not None else int(manifest.scalars.get("step", 0))

    def _prepared(self, manifest: Manifest, allow: Sequence[str]) -> Restore:
        """The restoration of a checkpoint, refused on all ranks alike. Collective."""
        meeting = self._meeting
        restore, told = meeting.agree(
            "restore",
            lambda: Restore(self.state, manifest, meeting.rank, meeting.size, allow),
            lambda restore: [[list(self.state), allow], restore.claimed],
        )
        if any(asked != told[0][0] for asked, _ in told):
            raise CheckpointError("the keys of the state, or what is allowed, differ between ranks")
        restore.check_claims([claimed for _, claimed in told])
        return restore

    def _wanted(self, targets: Targets, members: Members) -> Wanted:
        """The boxes that each rank of this node wants. Collective."""
        asked = {n: [(b.start, b.stop) for b in boxes] for n, boxes in boxes_of(targets).items()}
        told = self._meeting.exchange("wanted", asked)
        return {
            rank: {
                name: [Box(tuple(start), tuple(stop)) for start, stop in boxes]
                for name, boxes in told[rank].items()
            }
            for rank in members.neighbours
        }


def save(folder: str | os.PathLike[str], state: ProgramState, *, step: int = 0) -> Path:
    """Save a program's state and wait for the commit. Returns the checkpoint's folder. Collective.

    Args:
        folder: the folder of checkpoints.
        state: the values to save, by key; see `Checkpointer`.
        step: the number of steps done; it names the checkpoint.
    Raises:
        CheckpointError: the state cannot be saved exactly, or the checkpoint could not be written.
    """
    with Checkpointer(folder, state, keep=0) as checkpointer:
        checkpointer.save(step, wait=True)
    return checkpointer.folder / name_of(step)


def load(
    path: str | os.PathLike[str], state: ProgramState, *, allow: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Load a program's state from a checkpoint, a folder of checkpoints, or a run. Collective.

    Args:
        path: a checkpoint, a folder of checkpoints, or the folder of a run; a path or URL.
        state: the values to restore, by the keys of the save; see `Checkpointer`.
        allow: names that may be absent; see `Checkpointer.load`.
    Returns:
        The plain values that were saved, tensors among them, by key.
    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or incomplete, lacks something
            that the state has, or has something for a key that the state has no place for.
    """
    with Checkpointer(os.curdir, state) as checkpointer:  # which nothing is saved to
        with checkpointer._meeting.in_turn():
            checkpointer._load_agreed(
                lambda: find_checkpoint(path).place if not _world()[0] else "", allow
            )
        return checkpointer.loaded


class _Ended:
    """The saves that have ended, as long as they are not told."""

    def __init__(self) -> None:
        self._results: list[SaveResult] = []
        self._failure = ""
        """The message of the last save if it failed and nothing was raised for it."""

    def add(self, results: Sequence[SaveResult], *, quiet: bool = False) -> None:
        """Note saves that have ended; failures are logged, unless they are raised next."""
        for result in results:
            self._results.append(result)
            failed = f"step {result.step} could not be saved: {result.error}"
            self._failure = failed if result.error else ""
            if result.error and not quiet:
                _log.warning("%s", failed)

    def take(self) -> list[SaveResult]:
        """The results since the last call; what has failed is told by them."""
        found, self._results = self._results, []
        self._failure = ""
        return found

    def raise_failure(self) -> None:
        """Raise CheckpointError if the last save failed, once."""
        failure, self._failure = self._failure, ""
        if failure:
            raise CheckpointError(failure)


def _check(fault: str) -> None:
    if fault:
        raise CheckpointError(fault)


def _newest_of(store: LocalStore) -> str:
    name = newest(store)
    return store.place_of(name) if name is not None else ""


def _world() -> tuple[int, int, Store]:
    """(rank, world size, store) of the default process group; a world of one without it."""
    if is_available() and is_initialized():
        return get_rank(), get_world_size(), _get_default_store()
    return 0, 1, HashStore()


def _view(entry: ProgramTensor, box: Box) -> Tensor:
    return entry.local[box.relative_to(entry.box).slices]
