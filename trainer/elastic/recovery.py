"""One worker of an elastic run: it agrees with the others, re-plans, moves state, and goes on.

A change of membership is a transaction, like a step. The survivors first finish the step that any of them has
come out of the vote of; then every rank builds its part of the next plan beside the old one, state moves from
holders to who needs it at once, and a last meeting of all ranks puts the plan in force. When that fails, the old
state is still there, and the next agreement begins from it. What can wait, such as all that a newcomer is to own,
moves beside the steps that follow, and a second change takes it into use (parallel/plan/admission.py). Exact-mode safe: no
value changes on its way.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from torch.distributed import Store

from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.membership import Membership
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.parallel.comm import (
    Communicator,
    GlooCommunicator,
    GlooMesh,
    Groups,
    MembershipChange,
    Operation,
    build_groups,
    edit_groups,
)
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.plan import (
    Plan,
    Roster,
    missing_blocks,
    next_plan,
    plan_from_data,
    plan_to_data,
    replan,
    state_of,
    with_shadows,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.state_recovery import fill_shadows, training_from_holders
from holdfast.trainer.elastic.worker_status import (
    RecoveryPlan,
    WorkerStatus,
    plan_recovery,
    status_to_data,
)
from holdfast.trainer.step import (
    StepProgress,
    Training,
    backend_of,
    choose_device,
    plan_of,
    rate_of,
)

logger = logging.getLogger("holdfast.elastic")

_POLL_S = 0.002
_NAMED_OPERATIONS = 4
"""Unfinished operations that a rank tells of when a step is interrupted."""
_KEY_S = 60.0
"""How long a word from another rank of a new generation is waited for."""

WITHIN_STEP = "within a step"

LoadFrom = Callable[[Training, Store, Generation], int]
"""Fills a new training from the newest checkpoint, collectively; returns its step, 0 without one."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of membership that has come into force; times in seconds on this rank."""

    before: Generation | None
    after: Generation
    recovery: RecoveryPlan
    from_checkpoint: int | None
    """The step that was loaded, when no live rank held all state."""
    agree_s: float
    edit_s: float
    move_s: float
    total_s: float
    moved_bytes: int
    """Of the optimizer's state, received by all ranks before the plan came into force."""
    plan_before: Plan
    """That was in force; the first plan of the configuration where none was."""

    @property
    def ranks_with_history(self) -> Collection[int]:
        """The ranks that know what was before."""
        return self.recovery.holders or self.recovery.staying

    @property
    def recorder(self) -> int:
        """The rank with history that records it."""
        return min(self.ranks_with_history)


class ElasticRun:
    """The state of one worker across generations. Not safe to share between threads, but for `disturb`."""

    def __init__(
        self, config: RunConfig, spec: WorkerSpec, membership: Membership, load: LoadFrom
    ) -> None:
        """Local.

        Args:
            load: used at the start, and when all holders of some block are gone.
        """
        self.config, self.spec, self.membership = config, spec, membership
        self.device = choose_device(config, spec.local_rank)
        self.leaving = False
        """Whether this worker is to hand its state over at the next change."""
        self.trusted = True
        """Whether the state of this run may be used at the next change; else a checkpoint is loaded."""
        self.training: Training | None = None
        self.generation: Generation | None = None
        """Of the plan in force."""
        self._load = load
        self._first_plan = plan_of(config)
        self._prepared: tuple[Generation, Training] | None = None
        self._groups: Groups | None = None
        self._connected: dict[int, Identity] = {}
        """The processes that `_groups` connect."""
        self._lock = threading.Lock()
        self._reason: str | None = None
        self.on_disturbed: Callable[[str], None] = lambda _: None
        """Called, in another thread, when the generation ends: to free what waits outside of its groups."""
        self.before_change: Callable[[], None] = lambda: None
        """Called before an agreement, when this worker's state is about to change."""
        membership.on_urgent(self._hear)

    @property
    def store(self) -> Store:
        """The rendezvous store of the plan in force."""
        return self.membership.store()

    def _hear(self, event: MembershipEvent) -> None:
        leaving = self.generation.members if self.generation is not None else ()
        if any(m.leaving and m.identity == event.identity for m in leaving):
            return  # it has handed everything over, and goes
        self.disturb(f"rank {event.identity}: {event.cause}")

    def disturb(self, reason: str) -> None:
        """End the generation on this rank: whoever waits gets `PeerLost`. From any thread."""
        with self._lock:
            self._reason = self._reason or reason
            groups = self._groups
        if groups is not None:
            groups.abort(reason)
        self.on_disturbed(reason)

    def check(self) -> None:
        """Raises:
        PeerLost: the generation has ended on this rank.
        """
        if self._reason is not None:
            raise PeerLost(f"the generation has ended: {self._reason}")

    def settle(self, *, urgent: bool) -> Change:
        """Agree, and recover, until a generation stands. Collective over all live workers.

        Args:
            urgent: the current step cannot be finished.
        Raises:
            Minority, Superseded, MembershipError: this worker must not go on.
        """
        while True:
            try:
                return self._change(urgent)
            except PeerLost as error:
                logger.info("the change of membership begins again: %s", error)
                self.disturb(str(error))
                urgent = True

    def _change(self, urgent: bool) -> Change:
        began = perf_counter()
        self.before_change()
        if self.training is not None and self.training.background_transfer is not None:
            self.training.background_transfer.close()
        with self._lock:
            self._reason = None
        generation = self.membership.agree(
            step=self.training.progress.decided if self.training is not None else 0,
            phase=WITHIN_STEP if urgent else "between steps",
            urgent=urgent,
            leaving=self.leaving,
            data=status_to_data(self._status(urgent=urgent)),
        )
        agree_s = perf_counter() - began
        recovery = plan_recovery(generation)
        self._activate(recovery)
        self._finish_step(recovery)
        store = self.membership.store()
        plan = self._plan_in_force(generation, recovery, store)
        following = self._next_plan(generation, recovery, plan)
        clock = perf_counter()
        groups, everybody, beside = self._connect(generation, recovery, following, store)
        edit_s = perf_counter() - clock
        clock = perf_counter()
        training, loaded, moved = self._build(
            generation, recovery, plan, following, groups, everybody, beside, store
        )
        if training is not None:
            self._prepared = (generation, training)
        everybody.barrier()
        self.trusted = True
        before, self.generation = self.generation, generation
        self.training, self._prepared = training, None
        change = Change(
            before=before,
            after=generation,
            recovery=recovery,
            from_checkpoint=loaded,
            agree_s=agree_s,
            edit_s=edit_s,
            move_s=perf_counter() - clock,
            total_s=perf_counter() - began,
            moved_bytes=moved,
            plan_before=plan,
        )
        logger.info(
            "generation %d: ranks %s, agreed in %.3f s, connected in %.3f s, %d bytes moved in %.3f s",
            generation.number,
            list(generation.ranks),
            agree_s,
            edit_s,
            moved,
            change.move_s,
        )
        return change

    def _status(self, *, urgent: bool) -> WorkerStatus:
        training = self.training
        prepared = 0
        if self._prepared is not None:
            prepared = self._prepared[0].number
            training = training or self._prepared[1]
        connected = self._groups is None or _mesh(self._groups).is_whole
        if training is None:
            return WorkerStatus(connected=connected)
        progress = training.progress
        return WorkerStatus(
            active=self.generation.number if self.generation is not None else 0,
            prepared=prepared,
            decided=progress.decided,
            updated=progress.updated,
            updates=training.optimizer.step,
            complete=progress.complete,
            filled=progress.filled,
            outcome=progress.outcome,
            counted=training.included(),
            connected=connected,
            trusted=self.trusted,
            operations=last_operations(training.groups.history()) if urgent else (),
        )

    def _activate(self, recovery: RecoveryPlan) -> None:
        """Put the plan in force that others have, and that was prepared here; else drop it."""
        prepared, self._prepared = self._prepared, None
        active = self.generation.number if self.generation is not None else 0
        if prepared is not None and recovery.active == prepared[0].number > active:
            self.generation, self.training = prepared
        elif recovery.active != active:
            # What others have put in force has gone past this worker's state.
            self.generation, self.training = None, None

    def _finish_step(self, recovery: RecoveryPlan) -> None:
        """Bring this rank's own blocks to the step that all holders are to have had."""
        training = self.training
        if training is None:
            return
        progress = training.progress
        if progress.decided < recovery.steps:
            progress.decided, progress.outcome = recovery.steps, recovery.outcome
        if progress.updated < progress.decided:
            training.protect(None)
            training.update(rate_of(self.config, progress.decided - 1))

    def _plan_in_force(self, generation: Generation, recovery: RecoveryPlan, store: Store) -> Plan:
        """The plan that holders have; told to those who have no state."""
        if not recovery.holders:
            return self._first_plan
        if self.training is None:
            told = json.loads(self.await_word(store, "plan"))
            return plan_from_data(self._first_plan, told)
        if self.spec.rank == recovery.holders[0] and recovery.fresh:
            store.set("plan", json.dumps(plan_to_data(self.training.plan)))
        return self.training.plan

    def _next_plan(self, generation: Generation, recovery: RecoveryPlan, plan: Plan) -> Plan:
        """The plan of a generation; equal on every rank."""
        roster = Roster(recovery.staying, _nodes(generation), recovery.fresh)
        redundancy = self.config.elastic.redundancy
        if not recovery.holders and recovery.staying == plan.stage_replicas.ranks:
            numbered = replace(plan, generation=generation.number, _cache=plan._cache)
            return with_shadows(numbered, roster, redundancy)
        # Within a step layers stay: the sums of those that moved would have to be computed again.
        move_layers = all(member.phase != WITHIN_STEP for member in generation.members)
        number = generation.number
        if not _has_all(plan, recovery):
            return replan(
                plan, roster, generation=number, redundancy=redundancy, move_layers=move_layers
            )
        return next_plan(
            plan,
            roster,
            filled=recovery.filled,
            generation=number,
            redundancy=redundancy,
            move_layers=move_layers,
        )

    def _connect(
        self, generation: Generation, recovery: RecoveryPlan, plan: Plan, store: Store
    ) -> tuple[Groups, Communicator, Communicator]:
        """This rank's groups of a plan, and two of all ranks of the generation: for the change, and beside steps."""
        rank = self.spec.rank
        world = plan.stage_replicas.ranks if rank in plan.stage_replicas.ranks else generation.ranks
        members = {member.rank: member.identity for member in generation.members}
        if self._groups is None:
            host = generation.store.rpartition(":")[0]
            groups = build_groups(
                store,
                host,
                rank,
                world,
                plan.stage_replicas.stage_replica(rank),
                world,
                backend=backend_of(self.config, self.device),
                generation=generation.number,
                record_path=self.spec.flight_record,
                votes_over_gloo=True,
            )
        else:
            change = MembershipChange(
                generation.number,
                left=_differing(self._connected, members),
                joined=_differing(members, self._connected),
                kept=recovery.connected,
            )
            groups = edit_groups(
                self._groups,
                change,
                world,
                plan.stage_replicas.stage_replica(rank),
                world,
                store=store,
            )
        with self._lock:
            self._groups, self._connected = groups, members
            reason = self._reason
        if reason is not None:
            groups.abort(reason)
        everybody, beside = (
            GlooCommunicator.over(_mesh(groups), name, generation.ranks)
            for name in ("generation", "beside")
        )
        return groups, everybody, beside

    def _build(
        self,
        generation: Generation,
        recovery: RecoveryPlan,
        plan: Plan,
        following: Plan,
        groups: Groups,
        everybody: Communicator,
        beside: Communicator,
        store: Store,
    ) -> tuple[Training | None, int | None, int]:
        """This rank's training under the next plan, with all its state.

        Returns:
            The training (None for a rank that leaves), the step that was loaded from a checkpoint if
            one was needed, and the bytes that all ranks received.
        """
        nodes, rank = _nodes(generation), self.spec.rank
        if _has_all(plan, recovery):
            training, moved = training_from_holders(
                self.config,
                rank,
                self.device,
                recovery,
                plan,
                following,
                self.training,
                groups,
                everybody,
                beside,
                nodes,
            )
            return training, None, moved
        if rank not in following.stage_replicas.ranks:
            return None, None, 0
        training = Training(self.config, rank, self.device, following, groups)
        step = self._load(training, store, generation)
        training.progress = StepProgress(decided=step, updated=step)
        moved = fill_shadows(training, groups.control, nodes)
        return training, step, moved

    def await_word(self, store: Store, key: str) -> bytes:
        """A word of another rank of this generation."""
        deadline = time.monotonic() + _KEY_S
        while not store.check([key]):
            if self._reason is not None:
                raise PeerLost(f"the generation ended meanwhile: {self._reason}")
            if time.monotonic() > deadline:
                raise PeerLost(f"no rank has given its {key} within {_KEY_S:g} s")
            time.sleep(_POLL_S)
        return store.get(key)


def _mesh(groups: Groups) -> GlooMesh:
    """The connections of votes, which always are over gloo here."""
    assert isinstance(groups.control, GlooCommunicator)
    return groups.control.mesh


def _has_all(plan: Plan, recovery: RecoveryPlan) -> bool:
    """Whether live ranks have the state of every block."""
    held = state_of(plan, recovery.holders, filled=recovery.filled)
    return bool(recovery.holders) and not missing_blocks(plan, held)


def _nodes(generation: Generation) -> dict[int, str]:
    return {member.rank: member.node for member in generation.members}


def last_operations(history: Sequence[Operation]) -> tuple[str, ...]:
    """The newest operation that ended well, and those that did not end, one line each. Pure."""
    done = [o for o in history if o.outcome == "done"][-1:]
    return tuple(
        f"{o.operation} ({o.direction}, {'group' if o.peer < 0 else f'rank {o.peer}'}, {o.group}, tag {o.tag}, "
        f"{o.bytes} bytes): {o.outcome}"
        for o in (*done, *[o for o in history if o.outcome != "done"][-_NAMED_OPERATIONS:])
    )


def _differing(these: dict[int, Identity], those: dict[int, Identity]) -> frozenset[int]:
    """Ranks whose process is not the same in the other set."""
    return frozenset(rank for rank, identity in these.items() if those.get(rank) != identity)
