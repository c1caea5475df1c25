"""The checkpoints of an elastic run, from one generation to the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from torch.distributed import Store

from holdfast.elastic import Generation, Membership, WorkerSpec
from holdfast.parallel.reading import decode_json
from holdfast.trainer.config import EVERY_CHANGE, RunConfig
from holdfast.trainer.elastic.interruption import Interruption, await_word
from holdfast.trainer.run import (
    Resume,
    RunDirectory,
    Signals,
    checkpoint_root,
    find_resume,
    forget_newer,
    set_aside_newer,
)
from holdfast.trainer.saves import Checkpoints
from holdfast.trainer.step import Training
from holdfast.trainer.worlds import WorldInfo


class ElasticSaves:
    """Saves and loads as one worker. One thread, but for `abort`."""

    def __init__(
        self,
        config: RunConfig,
        spec: WorkerSpec,
        membership: Membership,
        run: RunDirectory,
        interruption: Interruption,
    ) -> None:
        self._config, self._spec, self._membership = config, spec, membership
        self._run, self._interruption = run, interruption
        self._signals = Signals()
        self._current: Checkpoints | None = None
        self._following: tuple[Training, Checkpoints] | None = None
        """A training that is not active yet, and its checkpoints."""
        self._notes: Sequence[str] = ()
        """The notes on its load."""
        self._ended = False

    @property
    def current(self) -> Checkpoints:
        """The checkpoints of the active training."""
        assert self._current is not None
        return self._current

    def listen(self) -> None:
        """Listen to signals that ask for a save or the end."""
        self._signals.listen()

    def abort(self, reason: str) -> None:
        """Release waits for a save of an ended generation. From any thread; does not block."""
        if self._current is not None and not self._ended:
            self._current.abort(reason)

    def cancel(self) -> None:
        """Give up the save under way, because the state that it copies will change."""
        if self._current is not None:
            self._current.cancel("the ranks of the run change; it is begun again")

    def end(self) -> None:
        """Note the end of the run: later losses of ranks do not matter to its saves."""
        self._ended = True

    def close(self) -> None:
        self._signals.close()
        if self._current is not None:
            self._current.close()

    def load(
        self, training: Training, store: Store, generation: Generation, *, sound_until: int | None
    ) -> int:
        """Fill a new training from the newest checkpoint. Returns its step.

        Collective over the ranks of the training's plan.

        Args:
            sound_until: newer checkpoints are set aside first, as they may hold corrupt state;
                None: none are.
        """
        if self._spec.rank == training.plan.stage_replicas.ranks[0]:
            found = self._run.resume
            if generation.number > 1:
                newest = find_resume(
                    self._run.root, self._config, "auto", allow_change=EVERY_CHANGE
                )
                candidates = newest.candidates or found.candidates
                found = replace(found, candidates=candidates, removals=newest.removals)
            if sound_until is not None:
                set_aside_newer(checkpoint_root(self._run.root, self._config), sound_until)
                forget_newer(self._run.root, sound_until)
                kept = [c for c in found.candidates if Path(c).is_dir()]
                found = replace(found, candidates=tuple(kept))
            store.set("resume", json.dumps(msgspec.to_builtins(found)))
        told = await_word(store, "resume", self._interruption)
        run = replace(self._run, resume=decode_json(told, Resume))
        notes = list(run.resume.notes)
        self._notes = notes
        checkpoints = self._checkpoints_of(training, generation, run)
        self._following = (training, checkpoints)
        return checkpoints.resume(notes.append)

    def agree(self, training: Training, generation: Generation, *, loaded: bool) -> None:
        """Make the checkpoints of a training that is not active yet.

        Collective over the ranks of the training's plan.

        Args:
            loaded: whether `load` has filled the training.
        """
        if not loaded:
            checkpoints = self._checkpoints_of(training, generation, self._run)
            self._following, self._notes = (training, checkpoints), ()
        assert self._following is not None
        self._following[1].agree(self._current, continued=not loaded)

    def go_on(self, training: Training) -> tuple[Checkpoints, Sequence[str]]:
        """Make the checkpoints of the newly activated training current. Local.

        Returns:
            The current checkpoints, and notes on a load.
        """
        assert self._following is not None
        assert self._following[0] is training
        following, self._following = self._following[1], None
        following.take_over(self._current)
        self._current = following
        return following, self._notes

    def _checkpoints_of(
        self, training: Training, generation: Generation, run: RunDirectory
    ) -> Checkpoints:
        machines = [generation.member(r).machine for r in training.plan.stage_replicas.ranks]
        world, store = world_of(generation, self._spec), self._membership.store()
        return Checkpoints(training, world, store, run, machines, self._signals)


def world_of(generation: Generation, spec: WorkerSpec) -> WorldInfo:
    """The world of a generation, as one of its workers sees it."""
    host, _, port = generation.store.rpartition(":")
    own = generation.member(spec.rank).node
    return WorldInfo(
        rank=spec.rank,
        world_size=len(generation.members),
        local_rank=spec.local_rank,
        local_world_size=sum(member.node == own for member in generation.members),
        node=0,
        store_host=host,
        store_port=int(port),
        store_is_server=False,
    )
