"""The training loop of one worker of an elastic run: steps, and membership changes between them."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch.distributed import DistError

from holdfast.elastic import Identity, Membership, MembershipEvent, MembershipHistory, WorkerSpec
from holdfast.parallel.errors import (
    ComputesWrongly,
    ConfigError,
    Diverged,
    NotSaved,
    PeerLost,
    Stopped,
    Undecided,
)
from holdfast.parallel.output import DiskWord
from holdfast.parallel.plan import would_move_layers
from holdfast.parallel.reading import decode_json, read_regular
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.interruption import Interruption
from holdfast.trainer.elastic.recovery import CompletedChange, Drives, Recovery
from holdfast.trainer.elastic.relief import Balance
from holdfast.trainer.elastic.run_terms import RunTerms
from holdfast.trainer.elastic.saves import ElasticSaves
from holdfast.trainer.elastic.session import ElasticSession
from holdfast.trainer.elastic.state_recovery import TrainingBuilder
from holdfast.trainer.elastic.testimony import testifying
from holdfast.trainer.elastic.transfer_pace import MembershipPace
from holdfast.trainer.elastic.transport import GroupTransport
from holdfast.trainer.reports import EventFile
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.step import (
    Outcome,
    Requests,
    Training,
    choose_device,
    device_memory,
    plan_of,
)
from holdfast.trainer.terms import TermsDiffer, own_terms

logger = logging.getLogger("holdfast.elastic")

_POLL_S = 0.01
_JOINING_S = 60.0
_AWAITED_STEPS = 20
"""Steps for which a replacement is awaited before layers move instead."""
_MOST_COLLECTIONS = 5


class HandedOver(Stopped):
    """This worker was told to leave, and the others have its state."""


class Wishes(Protocol):
    """Workers that wait to join or leave; `holdfast.elastic.membership.Membership`."""

    @property
    def wanted(self) -> tuple[MembershipEvent, ...]: ...


class Session(Protocol):
    """The work under the active plan; `holdfast.trainer.elastic.session.ElasticSession`."""

    def step(self, step: int, *, change: bool, leave: bool) -> Outcome: ...

    def finish(self) -> None: ...

    def stop(self, step: int, requests: Requests, *, leaving: bool) -> None: ...

    def compare(self, step: int) -> bool: ...

    def go_on(self, change: CompletedChange, training: Training) -> None: ...

    def record(self, change: CompletedChange, *, urgent: bool) -> None: ...

    def evaluate_interrupted_step(self, change: CompletedChange) -> Mapping[str, float]: ...

    def report_interrupted_step(
        self, change: CompletedChange, evaluated: Mapping[str, float]
    ) -> None: ...


class _Change(NamedTuple):
    """A change of the plan that follows a step."""

    urgent: bool = False
    """Whether the step was interrupted."""
    leaving: bool = False
    """Whether this worker leaves."""


class ElasticLoop:
    """Trains as one worker until the run's last step, while ranks come and go.

    It decides when to step, when to change, and when to end. `Recovery` makes the changes, and the
    session does the rest. All its partners are passed in, so it runs alone in a test.
    """

    def __init__(
        self,
        config: RunConfig,
        identity: Identity,
        recovery: Recovery,
        session: Session,
        membership: Wishes,
        interruption: Interruption,
        history: MembershipHistory | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is trained yet.

        Args:
            history: the changes of a run that this one repeats, at the same steps; None: none.
        """
        self._config, self._identity = config, identity
        self._recovery, self._session = recovery, session
        self._membership, self._interruption, self._history = membership, interruption, history
        self._clock, self._sleep = clock, sleep
        self._verified = 0
        """The last step at which all copies of the state were equal."""
        self._tidy_from: int | None = None
        """The step from which on a change without joining ranks is wanted; see `tidy_step`."""
        self._balance = Balance(config.elastic)

    def run(self) -> None:
        """Train. Collective over all workers.

        Raises:
            HandedOver: this worker leaves.
            Stopped: a signal ended the run.
            MembershipError: this worker must not go on.
            NumericsError, Diverged, CheckpointError: as for `holdfast.trainer.loop.train`.
        """
        training = self._recover(urgent=False)
        while True:
            step = training.progress.decided
            change: _Change | None = None
            try:
                if step >= self._config.train.steps:
                    self._session.finish()
                    return
                wanted, mine = self._wishes(training, step)
                outcome = self._session.step(step, change=wanted, leave=mine)
                self._balance.after_step(training)
                done = training.progress.decided  # fewer than before if the run has gone back
                sound = self._compare_when_due(done)
                if sound and self._stops(training, done, outcome):
                    return
                if not sound:
                    change = _Change()
                elif self._changes(training, outcome):
                    change = _Change(leaving=mine)
            except (PeerLost, DistError) as error:  # the node of the store may be gone, too
                logger.warning("step %d is interrupted: %s", training.progress.decided + 1, error)
                self._recovery.abort(str(error))
                change = _Change(urgent=True)
            if change is not None:
                training = self._recover(urgent=change.urgent, leaving=change.leaving)
                _forget_what_was_replaced()

    def _changes(self, training: Training, outcome: Outcome) -> bool:
        """Whether the plan changes after a step with this outcome."""
        arrived = bool(training.plan.incoming) and not outcome.requests.filling
        return outcome.requests.change or (arrived and self._history is None)

    def _stops(self, training: Training, step: int, outcome: Outcome) -> bool:
        """Whether the run ends after this step, counted from 1; it is saved then."""
        stop_after = self._config.train.stop_after
        leaving = outcome.leaving_ranks == training.plan.stage_replicas.size
        if outcome.requests.stop or leaving or (stop_after and step >= stop_after):
            self._session.stop(step, outcome.requests, leaving=leaving)
            return True
        return False

    # The wishes for a step.

    def _wishes(self, training: Training, step: int) -> tuple[bool, bool]:
        """Whether the ranks change after the next step, and whether this one leaves then."""
        if self._history is not None:
            self._await_joining(training, self._history.awaited(step))
            leaves = self._history.leaves_after(self._identity.rank, step + 1)
            return self._history.changes_after(step + 1), leaves
        wanted = self._membership.wanted
        if training.plan.incoming:
            # A newcomer waits for state on its way, because a change would restart that transfer.
            wanted = tuple(event for event in wanted if event.kind != "joining")
        mine = any(e.kind == "leaving" and e.identity == self._identity for e in wanted)
        tidy = self._tidy_from is not None and step >= self._tidy_from
        return bool(wanted) or tidy or self._balance.wants_change, mine

    def _repeat_slowness(self) -> None:
        """Take the speeds of ranks as the run that this one repeats did at its next change."""
        training = self._recovery.training
        if self._history is not None and training is not None:
            progress = training.progress
            slow = self._history.slowness_after(progress.decided)
            progress.recent = replace(progress.recent, slowness=(slow, slow))

    def _await_joining(self, training: Training, ranks: frozenset[int]) -> None:
        """Wait for the ranks that joined at this point of the repeated run."""
        deadline_s = self._clock() + _JOINING_S
        missing = set(ranks) - set(training.plan.stage_replicas.ranks)
        while missing and self._clock() < deadline_s:
            self._interruption.check()
            self._sleep(_POLL_S)
            missing -= {e.identity.rank for e in self._membership.wanted if e.kind == "joining"}

    # Soundness of the state.

    def _compare_when_due(self, step: int) -> bool:
        every = self._config.elastic.verify_every
        return self._is_sound(step) if every and step % every == 0 else True

    def _is_sound(self, step: int) -> bool:
        """Compare all copies of the state; unsound state is not used again. Collective."""
        sound = self._session.compare(step)
        if sound:
            self._verified = step
        else:
            self._recovery.distrust(self._verified)
        return sound

    # Changes of membership.

    def _recover(self, *, urgent: bool, leaving: bool = False) -> Training:
        """Agree and recover until there is a sound state. Returns the training to continue with."""
        while True:
            self._repeat_slowness()
            change = self._recovery.recover(urgent=urgent, leaving=leaving)
            training = self._recovery.training
            if training is None:
                raise HandedOver("this rank was told to leave, and has handed its state over")
            self._tidy_from = tidy_step(change, training, respawn=self._config.elastic.respawn)
            self._balance.after_change(None if urgent else change.total_s)
            self._session.go_on(change, training)
            sound, interrupted, evaluated = False, False, {}
            try:
                had_state = change.before is not None or bool(change.recovery.holders)
                sound = not had_state or self._is_sound(training.progress.decided)
                if sound:
                    evaluated = self._session.evaluate_interrupted_step(change)
            except (PeerLost, DistError) as error:
                logger.warning("what follows a change was interrupted: %s", error)
                self._recovery.abort(str(error))
                sound, interrupted = False, True
            self._session.record(change, urgent=urgent)
            if sound:
                self._session.report_interrupted_step(change, evaluated)
                return training
            urgent = interrupted


def tidy_step(change: CompletedChange, training: Training, *, respawn: bool) -> int | None:
    """The step from which on a further change is wanted; None if there is none. Pure.

    It is wanted at once, to forget a rank that has left, or later, to balance the stages. A
    replacement for a lost worker is awaited first, because moving layers twice costs more.
    """
    step = training.progress.decided
    if training.plan.incoming:
        return None  # the vote says when all is there
    if any(member.leaving for member in change.after.members):
        return step
    if would_move_layers(training.plan):
        return step + (_AWAITED_STEPS if respawn else 0)
    return None


def _forget_what_was_replaced() -> None:
    """Free the training before: errors refer to frames, and these to it and to its graphs.

    Graphs that are freed leave behind what refers to itself, and so on. Of a backward pass that was
    interrupted, torch keeps the rest until the next one.
    """
    torch.ones((), requires_grad=True).clone().backward()
    for _ in range(_MOST_COLLECTIONS):
        if not gc.collect():
            return


def train_elastic_worker(
    config: RunConfig, spec: WorkerSpec, channel: socket.socket, run: RunDirectory
) -> None:
    """Train as the worker of a spec, and tell its agent when all is done, or when it has left.

    Raises as `ElasticLoop.run` does, but for `HandedOver`.
    """
    gc.freeze()  # what is imported is not looked through after each change of plan
    with contextlib.ExitStack() as held:
        membership = Membership(spec, channel, examine=testifying(spec))
        held.callback(membership.close)
        with contextlib.closing(EventFile(run.events, DiskWord(_telling(membership)))) as events:
            events.append(
                "worker_started",
                rank=spec.rank,
                pid=os.getpid(),
                node=spec.node,
                machine=spec.machine,
                incarnation=spec.incarnation,
            )
            try:
                _train(config, spec, membership, run, events)
            except HandedOver as end:
                logger.info("%s", end)
                membership.left()
                return
        membership.finished()


def _telling(membership: Membership) -> Callable[[str], None]:
    """Tells a line to the user, through the agent, and to the log."""

    def say(line: str) -> None:
        logger.warning("%s", line)
        membership.tell(line)

    return say


def _train(
    config: RunConfig,
    spec: WorkerSpec,
    membership: Membership,
    run: RunDirectory,
    events: EventFile,
) -> None:
    with contextlib.ExitStack() as held:
        interruption = Interruption()
        saves = ElasticSaves(config, spec, membership, run, interruption)
        session = ElasticSession(config, spec, membership, run, events, saves)
        held.callback(session.close)
        terms = RunTerms(
            lambda: own_terms(config, spec.local_rank),
            spec,
            run,
            interruption,
            _telling(membership),
        )
        if not spec.founder:
            _admit(terms, spec, events)
        device = choose_device(config, spec.local_rank)
        history = _history(run)
        drives = Drives(
            membership,
            GroupTransport(config, spec, device, interruption, terms.compare),
            TrainingBuilder(
                config,
                spec.rank,
                device,
                saves,
                lambda training: MembershipPace(training, spec.rank, membership, history),
            ),
            saves,
            interruption,
            memory=device_memory(device),
        )
        recovery = Recovery(spec.rank, config, plan_of(config), drives)
        saves.listen()
        held.callback(saves.close)
        loop = ElasticLoop(
            config, spec.identity, recovery, session, membership, interruption, history
        )
        try:
            loop.run()
        except (NotSaved, Diverged, Undecided):
            # A new worker would train the same steps again, to the same end.
            membership.incurable()
            raise
        except ComputesWrongly:
            membership.sick()
            raise


def _admit(terms: RunTerms, spec: WorkerSpec, events: EventFile) -> None:
    """Let a newcomer in if it trains with what the run trains with.

    Raises:
        TermsDiffer: it does not; the run goes on without it.
    """
    try:
        terms.require_admission()
    except TermsDiffer as error:
        events.append(
            "newcomer_refused", rank=spec.rank, incarnation=spec.incarnation, reason=str(error)
        )
        raise


def _history(run: RunDirectory) -> MembershipHistory | None:
    """The membership changes that this run repeats, if it repeats a run.

    Raises:
        ConfigError: the file of changes cannot be read, or is damaged.
    """
    try:
        return decode_json(read_regular(run.journal), MembershipHistory)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run.journal} cannot be read: {error}; replay the run again") from error
