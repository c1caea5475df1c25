"""Checkpoints for any torch program, without our trainer: plain modules, DDP, FSDP2 and tensor parallelism.

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

from holdfast.checkpoint.format import HeldBox, SavedTensor, WritePlan, directory
from holdfast.checkpoint.loading import (
    FolderReader,
    LoadStatistics,
    LoadTarget,
    boxes_of,
    check_coverage,
    load as load_targets,
)
from holdfast.checkpoint.program_state import (
    Entry,
    ProgramState,
    entries_of,
    make_optimizer_state,
    parameter_names,
    restore_scalars,
    scalars_of,
)
from holdfast.checkpoint.saving import ALL, SaveJob, Saver, SaveResult, make_write_plan
from holdfast.checkpoint.tools import check_small_parts
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

_LARGEST_ARENA_BYTES = 2 << 30


class Checkpointer:
    """Saves and loads a program's state. All ranks of the default process group make and call it.

    Parameters and optimizer state are copied while the next step computes; before the optimizer changes
    them, a hook on its `step` copies what is left. Buffers are copied at once. Without an optimizer in the
    state nothing says when parameters change, so `save` copies everything before it returns.
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
        """Collective over all ranks of the default process group.

        Args:
            folder: where checkpoints go; on several machines one that all of them see.
            state: what is saved, by key: modules ("model" keeps its own names), optimizers,
                schedulers, tensors, and numbers or text (their values are taken at each save).
            keep: checkpoints that stay; 0: all.
            arena_bytes: host memory between the state and the disk; 0: enough for this rank's
                share, 2 GiB at most.
            timeout_s: after which a save is given up.
        """
        self.folder = Path(folder)
        self.state = state
        self._keep, self._arena_bytes, self._timeout_s = keep, arena_bytes, timeout_s
        self._rank, self._world_size, store = _world()
        # Counted by the store, so that what this process did before in other groups does not count.
        number = store.add(f"holdfast/checkpointers/{self._rank}", 1)
        self._store = PrefixStore(f"holdfast/{number}", store)
        self._nodes = self._exchange_nodes()
        self._plan: tuple[object, WritePlan] | None = None
        self._saver: Saver | None = None
        self._loads = 0
        self._results: list[SaveResult] = []
        self._hooks = [
            value.register_step_pre_hook(self._before_update)
            for value in state.values()
            if isinstance(value, Optimizer)
        ]

    def save(self, step: int, *, wait: bool = False) -> None:
        """Begin to save the state as it is now; a save under way is finished first. Collective.

        Args:
            wait: return only when it is committed; raises CheckpointError when it failed.
        """
        entries = entries_of(self.state)
        plan = self._plan_of(entries)
        saver = self._open_saver(plan, entries)
        saver.wait(self._timeout_s)
        held = {entry.name: _held(entry) for entry in entries}
        saver.start(
            SaveJob(
                step=step,
                root=self.folder,
                tier="disk",
                plan=plan,
                source=lambda name, box: _view(held[name], box),
                scalars={"step": step, "state": scalars_of(self.state)},
                versions={"holdfast": version("holdfast"), "torch": str(torch.__version__)},
                keep=self._keep,
            )
        )
        if wait or not self._hooks:
            saver.fence(ALL)
        if wait:
            saver.wait()
            failed = [result.error for result in self.results() if result.error]
            if failed:
                raise CheckpointError(f"step {step} could not be saved: {failed[-1]}")

    def load(self, step: int | None = None) -> int | None:
        """Fill the state from the newest checkpoint, or that of `step`. Collective.

        Returns:
            The step of the checkpoint; None if there is none. Plain values of the state are in `loaded`.
        Raises:
            CheckpointError: damaged, incomplete, or of other shapes.
        """
        path = self._agreed_path(step)
        if path is None:
            return None
        self.loaded = self._load_from(path)
        found = directory.step_of(path)
        return found if found is not None else int(self.loaded.get("step", 0))

    def results(self) -> list[SaveResult]:
        """Saves that have ended since the last call, with times and errors."""
        return self._saver.results() if self._saver is not None else []

    def wait(self) -> None:
        """Wait for the save under way to be committed. Raises CheckpointError when it failed."""
        if self._saver is None:
            return
        self._saver.wait()
        for result in self.results():
            if result.error:
                raise CheckpointError(f"step {result.step} could not be saved: {result.error}")

    def close(self) -> None:
        """Finish the save under way, take the hooks off, release files and memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._saver is not None:
            self._saver.close()
            self._saver = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    loaded: Mapping[str, Any] = {}
    """Plain values of the last load, by their keys."""
    load_statistics: LoadStatistics | None = None
    """What the last load took on this rank."""

    def _before_update(self, *_: object) -> None:
        if self._saver is not None:
            self._saver.fence(ALL)

    def _open_saver(self, plan: WritePlan, entries: list[Entry]) -> Saver:
        if self._saver is None:
            share = plan.written_bytes().get(self._rank, 0)
            self._saver = Saver(
                self._rank,
                self._nodes,
                self._store,
                arena_bytes=self._arena_bytes or min(_LARGEST_ARENA_BYTES, share + (16 << 20)),
                timeout_s=self._timeout_s,
                pinned=any(entry.local.is_cuda for entry in entries),
            )
        return self._saver

    def _exchange_nodes(self) -> tuple[int, ...]:
        names = self._exchange("node", socket.gethostname())
        distinct = list(dict.fromkeys(names))
        return tuple(distinct.index(name) for name in names)

    def _exchange(self, key: str, mine: Any) -> list[Any]:
        """What every rank says, by rank."""
        self._store.set(f"{key}/{self._rank}", msgspec.json.encode(mine).decode())
        keys = [f"{key}/{rank}" for rank in range(self._world_size)]
        self._store.wait(keys)
        return [msgspec.json.decode(self._store.get(name)) for name in keys]

    def _plan_of(self, entries: list[Entry]) -> WritePlan:
        """Who writes what; kept while names, shapes and boxes stay as they are."""
        mine = [(e.name, e.kind, e.dtype, e.shape, e.box.start, e.box.stop) for e in entries]
        if self._plan is None or self._plan[0] != mine:
            self._loads += 1
            described = self._exchange(f"entries-{self._loads}", mine)
            self._plan = mine, make_write_plan(_saved(described), self._nodes)
        return self._plan[1]

    def _agreed_path(self, step: int | None) -> Path | None:
        """Rank 0's choice, so that all ranks load the same checkpoint."""
        self._loads += 1
        choice = ""
        if self._rank == 0:
            if step is not None:
                choice = str(self.folder / directory.name_of(step))
            else:
                newest = directory.newest(self.folder)
                choice = str(newest) if newest is not None else ""
        agreed = self._exchange(f"path-{self._loads}", choice)[0]
        return Path(agreed) if agreed else None

    def _load_from(self, path: Path) -> Mapping[str, Any]:
        manifest = directory.read_manifest(path)
        check_coverage(manifest, str(path))
        names = parameter_names(self.state)
        shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
        for value in self.state.values():
            if isinstance(value, Optimizer):
                make_optimizer_state(value, names, shapes)
        targets: defaultdict[str, list[LoadTarget]] = defaultdict(list)
        for entry in entries_of(self.state):
            targets[entry.name].append(LoadTarget(entry.box, entry.local))
        here = [r for r, node in enumerate(self._nodes) if node == self._nodes[self._rank]]
        asked = {n: [(b.start, b.stop) for b in boxes] for n, boxes in boxes_of(targets).items()}
        told = self._exchange(f"wanted-{self._loads}", asked)
        wanted = {
            rank: {
                name: [Box(tuple(start), tuple(stop)) for start, stop in boxes]
                for name, boxes in told[rank].items()
            }
            for rank in here
        }
        reader = FolderReader(path)
        try:
            check_small_parts(
                manifest, reader, list(manifest.files)[here.index(self._rank) :: len(here)]
            )
            self.load_statistics = load_targets(
                manifest,
                reader,
                targets,
                wanted,
                self._rank,
                store=self._store,
                name=str(self._loads),
                timeout_s=self._timeout_s,
                where=str(path),
            )
        finally:
            reader.close()
        return restore_scalars(self.state, manifest.scalars.get("state", {}))


def save(folder: str | os.PathLike[str], state: ProgramState, *, step: int = 0) -> Path:
    """Save a program's state and wait for it; returns the checkpoint's folder. Collective.

    Raises:
        CheckpointError: it could not be written.
    """
    with Checkpointer(folder, state, keep=0) as checkpointer:
        checkpointer.save(step, wait=True)
    return Path(folder) / directory.name_of(step)


def load(path: str | os.PathLike[str], state: ProgramState) -> Mapping[str, Any]:
    """Fill a program's state from a checkpoint, a folder of them, or a run. Collective.

    Returns:
        The plain values that were saved, by their keys.
    Raises:
        CheckpointError: there is none, or it is damaged, incomplete or of other shapes.
    """
    found = directory.find_checkpoint(Path(path))
    checkpointer = Checkpointer(found.parent, state, keep=0)
    try:
        return checkpointer._load_from(found)
    finally:
        checkpointer.close()


def _world() -> tuple[int, int, Store]:
    """(rank, world size, store) of the default process group; a world of one without it."""
    if is_available() and is_initialized():
        return get_rank(), get_world_size(), _get_default_store()
    return 0, 1, HashStore()


def _held(entry: Entry) -> Entry:
    """An entry whose memory stays as it is until the next step of the optimizer."""
    if entry.changes_in_forward or not entry.local.is_contiguous():
        local = entry.local.clone(memory_format=torch.contiguous_format)
        return Entry(entry.name, entry.kind, entry.shape, entry.box, local, False)
    return entry


def _view(entry: Entry, box: Box) -> Tensor:
    return entry.local[box.relative_to(entry.box).slices]


def _saved(described: list[list[Any]]) -> list[SavedTensor]:
    """The tensors of all ranks: each box with the ranks that have it."""
    holders: defaultdict[str, dict[Box, list[int]]] = defaultdict(dict)
    form: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for rank, entries in enumerate(described):
        for name, kind, dtype, shape, start, stop in entries:
            box = Box(tuple(start), tuple(stop))
            known = form.setdefault(name, (kind, dtype, tuple(shape)))
            if known != (kind, dtype, tuple(shape)):
                raise CheckpointError(
                    f"{name} is {known[1]} {list(known[2])} on one rank and {dtype} {list(shape)} on rank "
                    f"{rank}"
                )
            if box.elements or not all(shape):
                holders[name].setdefault(box, []).append(rank)
    tensors = []
    for name, (kind, dtype, shape) in form.items():
        parts = tuple(HeldBox(box, tuple(ranks)) for box, ranks in holders[name].items())
        rows = all(part.box.start[1:] == (0,) * len(shape[1:]) for part in parts) and all(
            part.box.stop[1:] == shape[1:] for part in parts
        )
        whole = kind in ("weight", "buffer") and rows
        tensors.append(SavedTensor(name, kind, dtype, shape, parts, whole))
    return tensors
