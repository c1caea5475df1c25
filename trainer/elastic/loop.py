"""The training loop of one worker that others may be lost beside: steps, and changes between or within them."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import torch
from torch.distributed import Store

from holdfast.elastic.faults import Fault, FaultInjector, fault_from_data
from holdfast.elastic.generation import Generation
from holdfast.elastic.history import MembershipHistory
from holdfast.elastic.membership import Membership
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.parallel.errors import PeerLost, Stopped
from holdfast.parallel.plan import would_move_layers
from holdfast.trainer.checkpointing import Checkpoints, Signals
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.corruption import compare_copies, repair
from holdfast.trainer.elastic.incidents import ChangeRecord, record_of, write_changes
from holdfast.trainer.elastic.recovery import Change, ElasticRun
from holdfast.trainer.loop import Parts, finish, run_step, stop
from holdfast.trainer.reports import PhaseClock, Reporter, append_event
from holdfast.trainer.run import Resume, RunDirectory, checkpoint_root, find_resume, set_aside_newer
from holdfast.trainer.step import Training, rate_of
from holdfast.trainer.world import WorldInfo

logger = logging.getLogger("holdfast.elastic")

_POLL_S = 0.01
_JOINING_S = 60.0
_AWAITED_STEPS = 20
"""For how many steps a replacement is awaited before layers move to make up for its lack."""


class ElasticLoop:
    """Trains as one worker until the run's last step, whoever comes and goes."""

    def __init__(
        self, config: RunConfig, spec: WorkerSpec, membership: Membership, run: RunDirectory
    ) -> None:
        self._config, self._spec, self._membership, self._run = config, spec, membership, run
        self._signals = Signals()
        self._checkpoints: Checkpoints | None = None
        self._reporter: Reporter | None = None
        self._clock = PhaseClock()
        self._notes: list[str] = []
        self._loaded: Checkpoints | None = None
        """Those of a training that has just been loaded."""
        self._digest = ""
        """Of the state at the last comparison of all copies."""
        self._verified = 0
        """The last step at which all copies of the state were equal."""
        self._tidy_from: int | None = None
        """The step from which on a change is wanted though nobody comes or goes: see `_tidy_step`."""
        self._history = _history(run)
        """Of a run whose changes this one repeats."""
        self._changes: list[ChangeRecord] = []
        """Since the last vote: whoever was to write them did so before it voted, or has died."""
        self._elastic = ElasticRun(config, spec, membership, self._load)
        self._elastic.on_disturbed = self._interrupt
        self._elastic.before_change = self._abandon_saves
        self._faults = FaultInjector(
            spec.rank,
            spec.incarnation,
            [fault_from_data(msgspec.to_builtins(fault)) for fault in config.elastic.chaos],
            asked=run.chaos,
            note=self._note_fault,
            corrupt=self._corrupt,
            cut=membership.cut_off,
            disk=checkpoint_root(run.root, config),
        )

    def run(self) -> None:
        """Train. Collective over all workers.

        Raises:
            Stopped: this worker has handed its state over and goes, or a signal ended the run.
            MembershipError: this worker must not go on.
            NumericsError, CheckpointError: as `holdfast.trainer.loop.train`.
        """
        self._signals.listen()
        try:
            self._settle(urgent=False)
            while not self._take_turn():
                pass
        finally:
            self._signals.close()
            if self._checkpoints is not None:
                self._checkpoints.close()
            if self._reporter is not None:
                self._reporter.close()

    def _take_turn(self) -> bool:
        """A step, or the end of the run; whether the run is over for this worker."""
        parts = self._parts()
        progress = parts.training.progress
        steps = self._config.train.steps
        try:
            if progress.decided >= steps:
                finish(parts)
                parts.training.groups.control.barrier()
                self._elastic.on_disturbed = lambda _: None
                return True
            step = progress.decided
            change, mine = self._wishes(step)
            self._pace_background_transfer(parts.training, step)
            outcome = run_step(parts, step, change=change, leave=mine)
            self._membership.committed(step + 1)
            self._changes.clear()
            every = self._config.elastic.verify_every
            if every and (step + 1) % every == 0 and not self._verify(parts.training, step + 1):
                self._settle(urgent=False)
                return False
            stop_after = self._config.train.stop_after
            everybody_leaves = outcome.leaving_ranks == parts.training.plan.stage_replicas.size
            if outcome.requests.stop or everybody_leaves or (stop_after and step + 1 >= stop_after):
                stop(parts, step + 1, asked=outcome.requests.stop or everybody_leaves)
                parts.training.groups.control.barrier()
                return True
        except PeerLost as error:
            logger.warning("step %d is interrupted: %s", progress.decided + 1, error)
            self._elastic.disturb(str(error))
            self._settle(urgent=True)
            return False
        arrived = bool(parts.training.plan.incoming) and not outcome.requests.filling
        if outcome.requests.change or (arrived and self._history is None):
            self._elastic.leaving = mine
            self._settle(urgent=False)
        return False

    def _wishes(self, step: int) -> tuple[bool, bool]:
        """Whether the ranks are to change after the next step, and whether this one is to leave then."""
        if self._history is not None:
            self._await_joining(self._history.awaited(step))
            leaves = self._history.leaves_after(self._spec.rank, step + 1)
            return self._history.changes_after(step + 1), leaves
        wanted = self._membership.wanted
        if self._parts().training.plan.incoming:
            # Who arrives now waits for those who are on their way: a change would begin that again.
            wanted = tuple(event for event in wanted if event.kind != "joining")
        mine = any(n.kind == "leaving" and n.identity == self._spec.identity for n in wanted)
        tidy = self._tidy_from is not None and step >= self._tidy_from
        return bool(wanted) or tidy, mine

    def _pace_background_transfer(self, training: Training, step: int) -> None:
        """What arrives beside the steps takes as many of them as in the run that is repeated, if one is."""
        if training.background_transfer is None:
            return
        if self._history is not None:
            training.background_transfer.required = self._history.filled_after(step + 1)
        elif self._spec.rank == training.plan.stage_replicas.ranks[0]:
            training.background_transfer.may_end = self._membership.can_agree

    def _await_joining(self, ranks: frozenset[int]) -> None:
        """Wait until those are ready to join who joined at this point in the run that is repeated."""
        deadline = time.monotonic() + _JOINING_S
        here = set(self._parts().training.plan.stage_replicas.ranks)
        missing = set(ranks) - here
        while missing and time.monotonic() < deadline:
            self._elastic.check()
            time.sleep(_POLL_S)
            joining = {n.identity.rank for n in self._membership.wanted if n.kind == "joining"}
            missing -= joining

    def _parts(self) -> Parts:
        assert self._elastic.training is not None
        assert self._checkpoints is not None
        assert self._reporter is not None
        return Parts(
            self._elastic.training, self._checkpoints, self._reporter, self._faults.at, self._clock
        )

    def _note_fault(self, fault: Fault) -> None:
        fields = asdict(fault)
        append_event(self._run.events, "fault_injected", **fields)
        logger.warning("on purpose: %s", fields)

    def _corrupt(self) -> None:
        """Flip one bit of what this rank owns, else shadows."""
        training = self._elastic.training
        assert training is not None
        own = training.optimizer.state["exp_avg"]
        values = own if own.numel() else training.shadows.state["exp_avg"]
        values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)[0] ^= 1 << 20

    def _verify(self, training: Training, step: int) -> bool:
        """Compare all copies of the state; whether it can be gone on from. Collective over all ranks."""
        control = training.groups.control
        compared = compare_copies(training, control)
        found = compared.corrupt
        self._digest = compared.digest
        spared = all(corruption.spares_training for corruption in found)
        if found and spared:
            repair(training, found, control)
        if self._spec.rank == training.plan.stage_replicas.ranks[0]:
            for corruption in found:
                append_event(
                    self._run.events,
                    "corruption",
                    step=step,
                    ranks=corruption.suspects,
                    block=corruption.tensor,
                    repaired=spared,
                )
        if spared:
            self._verified = step
            return True
        logger.error("state is corrupt at step %d: %s", step, [c.tensor for c in found])
        self._elastic.trusted = False
        return False

    # Changes of membership.

    def _settle(self, *, urgent: bool) -> None:
        """Agree and recover; then go on under the plan that is in force."""
        change = self._elastic.settle(urgent=urgent)
        training = self._elastic.training
        if training is None:
            raise Stopped("this rank has handed its state over and leaves; the others go on")
        self._tidy_from = self._tidy_step(change, training)
        self._clock = PhaseClock()
        recovery = change.recovery
        loaded, self._loaded = self._loaded, None
        following = loaded or self._checkpoints_of(training, change.after, self._run)
        following.take_over(self._checkpoints if change.from_checkpoint is None else None)
        world = self._world(change.after)
        outcome = recovery.outcome if change.from_checkpoint is None else None
        if self._reporter is None:
            # The last step may be missing in the records; then this rank writes it, if it is the lowest.
            first = training.progress.decided - (outcome is not None)
            self._reporter = Reporter(training, world, self._run, [], first, shown=False)
        elif change.from_checkpoint is not None:
            self._reporter.roll_back(change.from_checkpoint)
        reporter = self._reporter
        reporter.change(training, world)
        if loaded is not None:
            reporter.resumed(training.progress.decided, loaded.loaded, self._notes)
        if self._checkpoints is not None:
            reporter.checkpoints(self._checkpoints.results())
        self._checkpoints = following
        told = self._membership.drain_events()
        changed = change.before is not None or bool(recovery.holders)
        sound = interrupted = False
        self._digest = ""
        self._faults.at(training.progress.decided + 1, "change")
        try:
            sound = not changed or self._verify(training, training.progress.decided)
        except PeerLost as error:
            logger.warning("the state after a change was not compared: %s", error)
            self._elastic.disturb(str(error))
            interrupted = True
        if self._spec.rank in change.ranks_with_history:
            record = record_of(change, told, training, urgent=urgent, digest=self._digest)
            self._changes.append(record)
        if self._spec.rank == change.recorder:
            write_changes(self._run, self._changes)
        if not sound:
            self._settle(urgent=interrupted)
            return
        if outcome is not None:
            # The step that the change interrupted, or that it follows, as all ranks know it.
            if outcome.usable:
                lr = rate_of(self._config, recovery.steps - 1)
                reporter.step(recovery.steps - 1, outcome, lr, (), None, None)
            if recovery.steps > following.committed_step:
                following.after_step(recovery.steps, outcome)

    def _tidy_step(self, change: Change, training: Training) -> int | None:
        """When to change again: at once to forget who has left; a little later to balance the stages.

        Where a lost worker is replaced, its replacement is awaited first: moving layers twice is dearer.
        """
        step = training.progress.decided
        if training.plan.incoming:
            return None  # the vote says when all is there
        if any(member.leaving for member in change.after.members):
            return step
        if would_move_layers(training.plan):
            return step + (_AWAITED_STEPS if self._config.elastic.respawn else 0)
        return None

    def _interrupt(self, reason: str) -> None:
        """Free what waits for a save of a generation that has ended. In another thread."""
        if self._checkpoints is not None:
            self._checkpoints.abort(reason)

    def _abandon_saves(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.cancel("the ranks of the run change; it is begun again")

    def _load(self, training: Training, store: Store, generation: Generation) -> int:
        """Fill a new training from the newest checkpoint there is now; returns its step."""
        if self._spec.rank == training.plan.stage_replicas.ranks[0]:
            found = self._run.resume
            if generation.number > 1:
                newest = find_resume(self._run.root, self._config, "auto", allow_change=True)
                found = replace(found, candidates=newest.candidates or found.candidates)
            if not self._elastic.trusted:
                # What was saved after the last comparison may be corrupt itself.
                set_aside_newer(checkpoint_root(self._run.root, self._config), self._verified)
                kept = [c for c in found.candidates if Path(c).is_dir()]
                found = replace(found, candidates=tuple(kept))
            store.set("resume", json.dumps(msgspec.to_builtins(found)))
        told = json.loads(self._elastic.await_word(store, "resume"))
        run = replace(self._run, resume=msgspec.convert(told, Resume))
        self._notes = list(run.resume.notes)
        self._loaded = self._checkpoints_of(training, generation, run)
        return self._loaded.resume(self._notes.append)

    def _checkpoints_of(
        self, training: Training, generation: Generation, run: RunDirectory
    ) -> Checkpoints:
        names = {member.rank: member.node for member in generation.members}
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()))}
        nodes = tuple(numbers[names[rank]] for rank in training.plan.stage_replicas.ranks)
        world, store = self._world(generation), self._membership.store()
        return Checkpoints(training, world, store, run, nodes, self._signals)

    def _world(self, generation: Generation) -> WorldInfo:
        host, _, port = generation.store.rpartition(":")
        own = generation.member(self._spec.rank).node
        return WorldInfo(
            rank=self._spec.rank,
            world_size=len(generation.members),
            local_rank=self._spec.local_rank,
            local_world_size=sum(member.node == own for member in generation.members),
            node=0,
            store_host=host,
            store_port=int(port),
            store_is_server=False,
        )


def _history(run: RunDirectory) -> MembershipHistory | None:
    if not run.journal.exists():
        return None
    return msgspec.json.decode(run.journal.read_bytes(), type=MembershipHistory)


def train_elastic_worker(
    config: RunConfig, spec: WorkerSpec, channel: socket.socket, run: RunDirectory
) -> None:
    """What a worker of an elastic run does with its spec. Raises as `ElasticLoop.run`."""
    append_event(
        run.events,
        "worker_started",
        rank=spec.rank,
        pid=os.getpid(),
        node=spec.node,
        incarnation=spec.incarnation,
    )
    membership = Membership(spec, channel)
    try:
        ElasticLoop(config, spec, membership, run).run()
    finally:
        membership.close()
