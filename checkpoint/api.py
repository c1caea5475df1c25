"""Checkpoints for any torch program without the trainer: modules, DDP, FSDP2 and DTensors.

checkpointer = Checkpointer("checkpoints", {"model": model, "optimizer": optimizer})
step = checkpointer.load() or 0
...
optimizer.step()
checkpointer.save(step)          # returns at once; the copy is made beside the next step
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
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
from torch.optim import Optimizer

from holdfast.checkpoint.format import (
    BUFFER,
    WEIGHT,
    HeldBox,
    Manifest,
    SavedTensor,
    WritePlan,
    name_of,
    step_of,
)
from holdfast.checkpoint.loading import LoadStatistics, LoadTarget, Targets, boxes_of
from holdfast.checkpoint.manager import CheckpointManager, ManagerSettings, Wanted
from holdfast.checkpoint.program_state import (
    ProgramState,
    ProgramTensor,
    entries_of,
    make_optimizer_state,
    parameter_names,
    restore_scalars,
    scalars_of,
)
from holdfast.checkpoint.saving import ALL, Members, SaveJob, SaveResult, make_write_plan
from holdfast.checkpoint.stores import (
    LocalStore,
    Retention,
    StoredCheckpoint,
    find_checkpoint,
    newest,
)
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box


class Checkpointer:
    """Saves and loads a program's state. All ranks of the default process group make and call it.

    Parameters and optimizer state are copied while the next step computes. A hook on the
    optimizer's `step` copies the rest before the update changes it. Buffers are copied at once.
    Without an optimizer in the state, nothing tells when parameters change, so `save` copies
    everything before it returns.
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
        """Register the hooks and prepare the folder. Collective over the default process group.

        Args:
            folder: the folder of checkpoints; on several machines, one that all of them see.
            state: the values to save, by key: modules ("model" keeps its own names), optimizers,
                schedulers, tensors, and numbers or text, which are read at each save.
            keep: the number of newest checkpoints that stay; 0: all.
            arena_bytes: host memory between the state and the disk; 0: enough for this rank's part
                of the checkpoint, 2 GiB at most.
            timeout_s: the time after which a save is given up, in seconds.
        """
        self.folder = Path(folder)
        self.state = state
        self._keep = keep
        rank, size, store = _world()
        # The store does the counting, so that earlier groups of this process do not count.
        number = store.add(f"holdfast/checkpointers/{rank}", 1)
        self._meeting = _Meeting(rank, size, PrefixStore(f"holdfast/{number}", store))
        names = self._meeting.exchange("node", socket.gethostname())
        distinct = list(dict.fromkeys(names))
        nodes = tuple(distinct.index(name) for name in names)
        members = Members(rank, nodes, self._meeting.store)
        self._manager = CheckpointManager(members, ManagerSettings(arena_bytes, timeout_s))
        self._plan: tuple[object, WritePlan] | None = None
        self._is_on_gpu = False
        """Whether a tensor of the plan is on a GPU."""
        self._hooks = [
            value.register_step_pre_hook(self._before_update)
            for value in state.values()
            if isinstance(value, Optimizer)
        ]

    def save(self, step: int, *, wait: bool = False) -> None:
        """Begin to save the present state; a save under way is finished first. Collective.

        Args:
            step: the number of steps done; it names the checkpoint.
            wait: return only once the checkpoint is committed; raise CheckpointError if the save
                fails.
        """
        entries = entries_of(self.state)
        plan = self._plan_of(entries)
        # Tensors that change in forward passes are copied at once, so the last save has to end
        # first.
        self._manager.finish()
        held = {entry.name: _held(entry) for entry in entries}
        self._manager.save(
            SaveJob(
                step=step,
                store=LocalStore(self.folder),
                tier="disk",
                plan=plan,
                source=lambda name, box: _view(held[name], box),
                scalars={"step": step, "state": scalars_of(self.state)},
                versions={"holdfast": version("holdfast"), "torch": str(torch.__version__)},
                retention=Retention(self._keep),
                pinned=self._is_on_gpu,
            )
        )
        if wait or not self._hooks:
            self._manager.fence(ALL)
        if wait:
            self.wait()

    def load(self, step: int | None = None) -> int | None:
        """Load the newest checkpoint, or that of `step`, into the state. Collective.

        Args:
            step: the checkpoint's number of steps; None: the newest checkpoint.
        Returns:
            The step of the checkpoint; None if there is no checkpoint. `loaded` has the plain
            values.
        Raises:
            CheckpointError: the checkpoint is damaged, incomplete, or has other shapes.
        """
        checkpoint = self._agreed_checkpoint(step)
        if checkpoint is None:
            return None
        self.loaded = self._load_from(checkpoint)
        found = step_of(checkpoint.name)
        return found if found is not None else int(self.loaded.get("step", 0))

    def results(self) -> list[SaveResult]:
        """The saves that have ended since the last call, with times and errors. Local."""
        return self._manager.results()

    def wait(self) -> None:
        """Wait until the save under way is committed. Raises CheckpointError if it failed."""
        self._manager.wait()
        for result in self.results():
            if result.error:
                raise CheckpointError(f"step {result.step} could not be saved: {result.error}")

    def close(self) -> None:
        """Finish the save under way, remove the hooks, release files and memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    loaded: Mapping[str, Any] = {}
    """The plain values of the last load, by their keys."""
    load_statistics: LoadStatistics | None = None
    """What the last load read, and how long it took, on this rank."""

    def _before_update(self, *_: object) -> None:
        self._manager.fence(ALL)

    def _plan_of(self, entries: list[ProgramTensor]) -> WritePlan:
        """The write plan; reused while names, shapes and boxes stay the same. Collective."""
        mine = [(e.name, e.kind, e.dtype, e.shape, e.box.start, e.box.stop) for e in entries]
        if self._plan is None or self._plan[0] != mine:
            described = self._meeting.exchange("entries", mine)
            self._is_on_gpu = any(entry.local.is_cuda for entry in entries)
            self._plan = mine, make_write_plan(_saved(described), self._manager.members.nodes)
        return self._plan[1]

    def _agreed_checkpoint(self, step: int | None) -> StoredCheckpoint | None:
        """The checkpoint that rank 0 chooses, so that all ranks load the same one. Collective."""
        store, choice = LocalStore(self.folder), ""
        if self._meeting.rank == 0:
            choice = name_of(step) if step is not None else newest(store) or ""
        agreed = self._meeting.exchange("choice", choice)[0]
        return StoredCheckpoint(store, agreed) if agreed else None

    def _load_from(self, checkpoint: StoredCheckpoint) -> Mapping[str, Any]:
        name = f"{self._meeting.exchanges}"
        manifest, self.load_statistics = self._manager.load(checkpoint, name, self._prepare)
        return restore_scalars(self.state, manifest.scalars.get("state", {}))

    def _prepare(self, manifest: Manifest) -> tuple[Targets, Wanted]:
        """The targets of a checkpoint's tensors, and the boxes wanted on this node. Collective.

        Optimizers first get empty tensors for the state that the checkpoint has for them.
        """
        names = parameter_names(self.state)
        shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
        for value in self.state.values():
            if isinstance(value, Optimizer):
                make_optimizer_state(value, names, shapes)
        targets: defaultdict[str, list[LoadTarget]] = defaultdict(list)
        for entry in entries_of(self.state):
            targets[entry.name].append(LoadTarget(entry.box, entry.local))
        asked = {n: [(b.start, b.stop) for b in boxes] for n, boxes in boxes_of(targets).items()}
        told = self._meeting.exchange("wanted", asked)
        wanted = {
            rank: {
                name: [Box(tuple(start), tuple(stop)) for start, stop in boxes]
                for name, boxes in told[rank].items()
            }
            for rank in self._manager.members.neighbours
        }
        return targets, wanted


def save(folder: str | os.PathLike[str], state: ProgramState, *, step: int = 0) -> Path:
    """Save a program's state and wait for the commit. Returns the checkpoint's folder. Collective.

    Args:
        folder: the folder of checkpoints.
        state: the values to save, by key; see `Checkpointer`.
        step: the number of steps done; it names the checkpoint.
    Raises:
        CheckpointError: the checkpoint could not be written.
    """
    with Checkpointer(folder, state, keep=0) as checkpointer:
        checkpointer.save(step, wait=True)
    return Path(folder) / name_of(step)


def load(path: str | os.PathLike[str], state: ProgramState) -> Mapping[str, Any]:
    """Load a program's state from a checkpoint, a folder of checkpoints, or a run. Collective.

    Args:
        path: a checkpoint, a folder of checkpoints, or the folder of a run.
        state: the values to restore, by the keys of the save; see `Checkpointer`.
    Returns:
        The plain values that were saved, by key.
    Raises:
        CheckpointError: there is no checkpoint, or it is damaged, incomplete, or has other shapes.
    """
    found = find_checkpoint(path)
    checkpointer = Checkpointer(path, state, keep=0)
    try:
        return checkpointer._load_from(found)
    finally:
        checkpointer.close()


class _Meeting:
    """An exchange of values between the ranks of a program. Every exchange is collective."""

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.exchanges = 0
        """The number of exchanges so far, equal on all ranks."""

    def exchange(self, what: str, mine: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        self.exchanges += 1
        key = f"{what}-{self.exchanges}"
        self.store.set(f"{key}/{self.rank}", msgspec.json.encode(mine).decode())
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self.store.wait(keys)
        return [msgspec.json.decode(self.store.get(name)) for name in keys]


def _world() -> tuple[int, int, Store]:
    """(rank, world size, store) of the default process group; a world of one without it."""
    if is_available() and is_initialized():
        return get_rank(), get_world_size(), _get_default_store()
    return 0, 1, HashStore()


def _held(entry: ProgramTensor) -> ProgramTensor:
    """A tensor whose memory does not change before the optimizer's next step."""
    if entry.changes_in_forward or not entry.local.is_contiguous():
        local = entry.local.clone(memory_format=torch.contiguous_format)
        return ProgramTensor(entry.name, entry.kind, entry.shape, entry.box, local, False)
    return entry


def _view(entry: ProgramTensor, box: Box) -> Tensor:
    return entry.local[box.relative_to(entry.box).slices]


def _saved(described: list[list[Any]]) -> list[SavedTensor]:
    """The tensors of all ranks: each box with the ranks that hold it."""
    holders: defaultdict[str, dict[Box, list[int]]] = defaultdict(dict)
    form: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for rank, entries in enumerate(described):
        for name, kind, dtype, shape, start, stop in entries:
            box = Box(tuple(start), tuple(stop))
            known = form.setdefault(name, (kind, dtype, tuple(shape)))
            if known != (kind, dtype, tuple(shape)):
                raise CheckpointError(
                    f"{name} is {known[1]} {list(known[2])} on one rank and {dtype} {list(shape)} "
                    f"on rank {rank}"
                )
            if box.elements or not all(shape):
                holders[name].setdefault(box, []).append(rank)
    tensors = []
    for name, (kind, dtype, shape) in form.items():
        parts = tuple(HeldBox(box, tuple(ranks)) for box, ranks in holders[name].items())
        rows = all(part.box.start[1:] == (0,) * len(shape[1:]) for part in parts) and all(
            part.box.stop[1:] == shape[1:] for part in parts
        )
        whole = kind in (WEIGHT, BUFFER) and rows
        tensors.append(SavedTensor(name, kind, dtype, shape, parts, whole))
    return tensors
