"""The recovery of one worker: agreement, next plan, state, and continuation.

A membership change is a transaction, like a step. The survivors first finish the step that is
committed if any of them has the result of its vote. Then every rank prepares its training under the
next plan beside the active one, state that is needed at once moves from its holders to the ranks
that need it, and a last barrier of all ranks activates the plan. If that fails, the active state is
still there, and the next agreement begins from it. State that can wait, such as all that a newcomer
will own, moves beside the following steps, and a second change activates it
(parallel/plan/admission.py). Exact-mode safe: no value changes on its way.

Inputs are membership events, errors of the transport, and the statuses that all members report when
they agree. The driven parts are given at construction, behind protocols.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any, Protocol

import msgspec
from torch.distributed import DistError, Store

from holdfast.elastic import Generation, MembershipEvent
from holdfast.parallel.comm import Operation
from holdfast.parallel.errors import PeerLost, TooFewRanks
from holdfast.parallel.plan import Plan, plan_from_data, plan_to_data
from holdfast.parallel.reading import decode_json, parse_json
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.interruption import Interruption, await_word
from holdfast.trainer.elastic.transition import (
    BETWEEN_STEPS,
    WITHIN_STEP,
    Transition,
    plan_transition,
)
from holdfast.trainer.elastic.transport import GenerationGroups
from holdfast.trainer.elastic.worker_status import (
    RecoveryPlan,
    WorkerStatus,
    plan_recovery,
    status_to_data,
)
from holdfast.trainer.step import (
    UNKNOWN_MEMORY,
    DeviceMemory,
    RecentSteps,
    Training,
    room_of,
)

logger = logging.getLogger("holdfast.elastic")

_TOO_FEW_S = 1.0
"""Seconds between two agreements while there are too few ranks."""
_NAMED_OPERATIONS = 4
"""The number of unfinished operations that a rank reports when a step is interrupted."""


class Agreement(Protocol):
    """The agreement on a generation; `holdfast.elastic.membership.Membership`."""

    def on_urgent(self, call: Callable[[MembershipEvent], None] | None) -> None: ...

    def hush(self) -> None: ...

    def agree(
        self,
        *,
        step: int,
        phase: str,
        urgent: bool = True,
        leaving: bool = False,
        data: Mapping[str, Any] | None = None,
    ) -> Generation: ...

    def store(self) -> Store: ...


class Transport(Protocol):
    """The connections of ranks; `holdfast.trainer.elastic.transport.GroupTransport`."""

    @property
    def is_whole(self) -> bool: ...

    def connect(self, transition: Transition, store: Store) -> GenerationGroups: ...

    def abort(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Built:
    """This rank's part of a change."""

    training: Training | None
    """The training under the next plan, with all its state; None for a rank that leaves."""
    from_checkpoint: int | None
    """The step that was loaded if no live rank held all state; else None."""
    moved_bytes: int
    """Bytes of optimizer state that all ranks received before the plan was activated."""


class Builder(Protocol):
    """The builder of a training; `holdfast.trainer.elastic.state_recovery.TrainingBuilder`."""

    def build(
        self,
        transition: Transition,
        active: Training | None,
        connection: GenerationGroups,
        store: Store,
        *,
        sound_until: int | None,
    ) -> Built: ...


class Saves(Protocol):
    """The saves under way; `holdfast.trainer.elastic.saves.ElasticSaves`."""

    def agree(self, training: Training, generation: Generation, *, loaded: bool) -> None: ...

    def abort(self, reason: str) -> None: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Drives:
    """The parts that a recovery drives, and the interruption."""

    membership: Agreement
    transport: Transport
    builder: Builder
    saves: Saves
    interruption: Interruption
    clock: Callable[[], float] = perf_counter
    sleep: Callable[[float], None] = sleep
    memory: DeviceMemory = UNKNOWN_MEMORY
    """The memory of this rank's device."""


@dataclass(frozen=True, slots=True)
class CompletedChange:
    """A membership change that has come into force; times in seconds on this rank."""

    before: Generation | None
    after: Generation
    recovery: RecoveryPlan
    from_checkpoint: int | None
    """The step that was loaded if no live rank held all state; else None."""
    agree_s: float
    edit_s: float
    move_s: float
    total_s: float
    moved_bytes: int
    """Bytes of optimizer state that all ranks received before the plan came into force."""
    plan_before: Plan
    """The plan before; the first plan of the configuration if there was none."""

    @property
    def ranks_with_history(self) -> Collection[int]:
        """The ranks that know the plan and state before."""
        return self.recovery.holders or self.recovery.staying

    @property
    def recorder(self) -> int:
        """The rank with history that records the change."""
        return min(self.ranks_with_history)


class Recovery:
    """The state of one worker across generations. One thread, but for `abort`."""

    def __init__(self, rank: int, config: RunConfig, first_plan: Plan, drives: Drives) -> None:
        """No generation is agreed on yet.

        Args:
            first_plan: the plan of the configuration, for a run without state.
        """
        self._rank, self._config, self._first_plan, self._drives = rank, config, first_plan, drives
        self.sound_until: int | None = None
        """Where the state is known to be corrupt, the last step at which it was sound: the next
        change loads a checkpoint that is no newer."""
        self.generation: Generation | None = None
        """The generation of the active plan."""
        self.training: Training | None = None
        """The training under the active plan."""
        self._prepared: tuple[Generation, Training] | None = None
        """A complete training that is not known to be active anywhere."""
        drives.membership.on_urgent(self._on_urgent)

    def _on_urgent(self, event: MembershipEvent) -> None:
        leaving = self.generation.members if self.generation is not None else ()
        if any(m.leaving and m.identity == event.identity for m in leaving):
            return  # it has handed everything over, and goes
        self.abort(f"rank {event.identity}: {event.cause}")

    def abort(self, reason: str) -> None:
        """End the generation on this rank: waits raise `PeerLost`.

        From any thread; never blocks.
        """
        self._drives.interruption.begin(reason)
        self._drives.transport.abort(reason)
        self._drives.saves.abort(reason)

    def distrust(self, sound_until: int) -> None:
        """Have the next change load a checkpoint, no newer than the last step that was sound."""
        self.sound_until = sound_until

    def recover(self, *, urgent: bool, leaving: bool = False) -> CompletedChange:
        """Agree and rebuild until a generation stands. Collective over all live workers.

        Args:
            urgent: whether the current step cannot be finished.
            leaving: this worker hands its state over, and goes.
        Raises:
            Minority, Superseded, MembershipError: this worker must not go on.
            TooFewRanks: no more ranks came within `elastic.apart_s`.
        """
        too_few_since: float | None = None
        while True:
            try:
                return self._change(urgent, leaving)
            except TooFewRanks as error:  # on all ranks alike: others may come
                now = self._drives.clock()
                too_few_since = now if too_few_since is None else too_few_since
                if now - too_few_since >= self._config.elastic.apart_s:
                    raise
                logger.warning("%s", error)
                self._drives.sleep(_TOO_FEW_S)
                urgent = True
            except (PeerLost, DistError) as error:  # the node of the store may be gone, too
                logger.info("the change of membership begins again: %s", error)
                self.abort(str(error))
                urgent = True

    def _change(self, urgent: bool, leaving: bool) -> CompletedChange:
        drives = self._drives
        began = drives.clock()
        self._leave(urgent=urgent)
        generation = drives.membership.agree(
            step=self.training.progress.decided if self.training is not None else 0,
            phase=WITHIN_STEP if urgent else BETWEEN_STEPS,
            urgent=urgent,
            leaving=leaving,
            data=status_to_data(self._status(urgent=urgent)),
        )
        agreed = drives.clock()
        recovery = plan_recovery(generation)
        self._activate_prepared(recovery)
        with self.training.busy("prepare") if self.training is not None else nullcontext():
            self._finish_step(recovery)
            if self.training is not None and self._rank not in recovery.included:
                self.training.release()  # the next plan's state takes its place
            store = drives.membership.store()
            transition = plan_transition(
                generation,
                recovery,
                self._active_plan(recovery, store),
                redundancy=self._config.elastic.redundancy,
                recent=self._recent_steps(recovery, store),
                has_room=room_of(self._config, recovery.rank_bytes),
                relieves=self._config.elastic.slow_ranks == "relieve",
            )
            edits = drives.clock()
            connection = drives.transport.connect(transition, store)
        moves = drives.clock()
        built = drives.builder.build(
            transition, self.training, connection, store, sound_until=self.sound_until
        )
        if built.training is not None:
            self._prepared = (generation, built.training)
            loaded = built.from_checkpoint is not None
            drives.saves.agree(built.training, generation, loaded=loaded)
        connection.members.barrier()
        before, self.generation = self.generation, generation
        self.training, self._prepared, self.sound_until = built.training, None, None
        ended = drives.clock()
        change = CompletedChange(
            before=before,
            after=generation,
            recovery=recovery,
            from_checkpoint=built.from_checkpoint,
            agree_s=agreed - began,
            edit_s=moves - edits,
            move_s=ended - moves,
            total_s=ended - began,
            moved_bytes=built.moved_bytes,
            plan_before=transition.before,
        )
        _log(change)
        return change

    def _leave(self, *, urgent: bool) -> None:
        """Leave the old generation, of which this rank hears no more."""
        drives = self._drives
        drives.saves.cancel()
        if self.training is not None:
            if urgent:
                self.training.close()
            else:
                self.training.finish_gather()
        # Others still say that they leave it, and none may end the next one.
        drives.membership.hush()
        drives.interruption.clear()

    def _status(self, *, urgent: bool) -> WorkerStatus:
        training = self.training
        prepared = 0
        if self._prepared is not None:
            prepared = self._prepared[0].number
            training = training or self._prepared[1]
        connected = self._drives.transport.is_whole
        memory = self._drives.memory
        if training is None:
            return WorkerStatus(connected=connected, memory=memory)
        progress = training.progress
        return WorkerStatus(
            active=self.generation.number if self.generation is not None else 0,
            prepared=prepared,
            decided=progress.decided,
            updated=progress.updated,
            updates=training.optimizer.step,
            complete=training.has_all_parameters,
            filled=progress.filled,
            outcome=progress.outcome,
            included=training.included(),
            inputs=training.kept_inputs(),
            connected=connected,
            memory=memory,
            rewinds=progress.rewinds,
            removals=tuple(training.config.data.without),
            trusted=self.sound_until is None,
            operations=last_operations(training.groups.history()) if urgent else (),
        )

    def _activate_prepared(self, recovery: RecoveryPlan) -> None:
        """Activate the plan that others have activated, if it is prepared here; else drop it."""
        prepared, self._prepared = self._prepared, None
        active = self.generation.number if self.generation is not None else 0
        if prepared is not None and recovery.active == prepared[0].number > active:
            self.generation, self.training = prepared
        elif recovery.active != active:
            # The other ranks have activated a plan that this worker's state does not reach.
            self.generation, self.training = None, None

    def _finish_step(self, recovery: RecoveryPlan) -> None:
        """Update this rank's own blocks to the newest committed step."""
        training = self.training
        if training is None:
            return
        if training.progress.rewinds < recovery.rewinds:
            training.go_back(recovery.steps, recovery.removals)
        progress = training.progress
        if progress.decided < recovery.steps and recovery.outcome is not None:
            window = self._config.numerics.spike_window
            progress.decide(recovery.steps, recovery.outcome, window)
        if progress.updated < progress.decided:
            training.protect(None)
            training.update(self._config.rate_of(progress.decided - 1))

    def _active_plan(self, recovery: RecoveryPlan, store: Store) -> Plan:
        """The plan of the holders, which the first of them tells the ranks without state."""
        if not recovery.holders:
            return self._first_plan
        if self.training is None:
            data = parse_json(await_word(store, "plan", self._drives.interruption))
            return plan_from_data(self._first_plan, data)
        if self._rank == recovery.holders[0] and recovery.fresh:
            store.set("plan", json.dumps(plan_to_data(self.training.plan)))
        return self.training.plan

    def _recent_steps(self, recovery: RecoveryPlan, store: Store) -> RecentSteps:
        """What the holders remember of the last steps; the first tells the ranks without state."""
        follows_loads = self._config.parallel.expert_replicas == "auto"
        relieves = self._config.elastic.slow_ranks == "relieve"
        remembers = self._config.numerics.spike_window or follows_loads or relieves
        if not recovery.holders or not remembers:
            return RecentSteps()
        if self.training is None:
            return decode_json(await_word(store, "recent", self._drives.interruption), RecentSteps)
        if self._rank == recovery.holders[0] and recovery.fresh:
            store.set("recent", msgspec.json.encode(self.training.progress.recent).decode())
        return self.training.progress.recent


def _log(change: CompletedChange) -> None:
    logger.info(
        "generation %d: ranks %s, agreed in %.3f s, connected in %.3f s, %d bytes moved in %.3f s",
        change.after.number,
        list(change.after.ranks),
        change.agree_s,
        change.edit_s,
        change.moved_bytes,
        change.move_s,
    )


def last_operations(history: Sequence[Operation]) -> tuple[str, ...]:
    """The newest operation that ended well, and those that did not end, one line each. Pure."""
    done = [o for o in history if o.outcome == "done"][-1:]
    return tuple(
        f"{o.operation} ({o.direction}, {'group' if o.peer < 0 else f'rank {o.peer}'}, "
        f"{o.group}, tag {o.tag}, {o.bytes} bytes): {o.outcome}"
        for o in (*done, *[o for o in history if o.outcome != "done"][-_NAMED_OPERATIONS:])
    )
