"""A cluster of fakes: one worker's loop and recovery run in memory, the others are a script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from holdfast.elastic.generation import Generation, Identity, Member
from holdfast.elastic.history import MembershipHistory
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.plan.plan import Plan
from holdfast.trainer.config.data_section import Removal
from holdfast.trainer.config.sections import RunConfig
from holdfast.trainer.elastic.interruption import Interruption
from holdfast.trainer.elastic.loop import ElasticLoop
from holdfast.trainer.elastic.recovery import Built, CompletedChange, Drives, Recovery
from holdfast.trainer.elastic.transition import Transition
from holdfast.trainer.elastic.transport import GenerationGroups
from holdfast.trainer.elastic.worker_status import (
    WorkerStatus,
    status_from_data,
    status_to_data,
)
from holdfast.trainer.step import plan_of
from holdfast.trainer.step.vote.progress import Outcome, Requests, StepProgress

STEPS = 6
CONFIG = """
[model]
family = "llama"
layers = 2
hidden = 32
intermediate = 48
heads = 4
kv_heads = 2
vocab = 64
[train]
steps = 6
seq_len = 16
global_batch = 12
micro_batch = 1
[optimizer]
block_elements = 256
[parallel]
data = 4
[elastic]
enabled = true
verify_every = 0
"""
OUTCOME = Outcome(loss=2.0, grad_norm=1.0, nonfinite_ranks=0, out_of_range_ranks=0)


def lost(*ranks: int) -> frozenset[int]:
    return frozenset(ranks)


class FakeStore:
    """A rendezvous store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]


class FakeTraining:
    """Counts steps and updates; holds no tensors."""

    def __init__(self, plan: Plan, progress: StepProgress) -> None:
        self.plan, self.progress = plan, progress
        self.rates: list[float] = []
        """Of updates that recovery asked for."""
        self.optimizer = SimpleNamespace(step=progress.updated)
        self.groups = SimpleNamespace(history=lambda: ())
        self.background_transfer: Any = None
        self.config = SimpleNamespace(data=SimpleNamespace(without=[]))

    def go_back(self, step: int, removals: Sequence[Removal]) -> None:
        self.progress = StepProgress(step, updated=step, rewinds=self.progress.rewinds + 1)
        self.optimizer.step = step
        self.config.data.without = list(removals)

    def included(self) -> dict[Any, Any]:
        return {}

    def kept_inputs(self) -> dict[Any, Any]:
        return {}

    def release(self) -> None: ...

    @property
    def has_all_parameters(self) -> bool:
        return self.progress.complete

    def finish_gather(self) -> None: ...

    def close(self) -> None: ...

    def protect(self, fence: None) -> None:
        assert fence is None

    def busy(self, kind: str) -> AbstractContextManager[None]:
        return nullcontext()

    def update(self, rate: float) -> None:
        self.rates.append(rate)
        self.progress.updated += 1
        self.optimizer.step += 1


@dataclass
class Turn:
    """What the others bring to one agreement."""

    lost: frozenset[int] = frozenset()
    joined: frozenset[int] = frozenset()
    leaving: frozenset[int] = frozenset()
    report: Callable[[WorkerStatus], WorkerStatus] = lambda status: status
    """The status of the others that have state, from this worker's own."""
    error: Exception | None = None


@dataclass
class FakeMembership:
    """Agrees at once: each turn of the script is one agreement."""

    identity: Identity
    ranks: set[int]
    script: list[Turn]
    calls: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[WorkerStatus] = field(default_factory=list)
    """This worker's own, one of each agreement."""
    wanted: tuple[MembershipEvent, ...] = ()
    incarnations: dict[int, int] = field(default_factory=dict)
    number: int = 0
    held: Mapping[int, int] = field(default_factory=dict)
    urgent: Callable[[MembershipEvent], None] | None = None
    is_hushed: bool = False
    """Whether no event may be reported, up to the end of an agreement."""
    the_store: FakeStore = field(default_factory=FakeStore)

    def on_urgent(self, call: Callable[[MembershipEvent], None] | None) -> None:
        self.urgent = call

    def hush(self) -> None:
        self.is_hushed = True

    def agree(self, **call: Any) -> Generation:
        turn = self.script.pop(0)
        self.is_hushed = False
        self.calls.append(call)
        own = status_from_data(call["data"])
        self.statuses.append(own)
        if turn.error is not None:
            raise turn.error
        self.ranks = (self.ranks - turn.lost) | turn.joined
        self.number += 1
        members = []
        for rank in sorted(self.ranks):
            if rank == self.identity.rank:
                status, identity = own, self.identity
            else:
                status = WorkerStatus() if rank in turn.joined else turn.report(own)
                identity = Identity(rank)
            members.append(
                Member(
                    identity,
                    node=f"node-{rank}",
                    store="host:1",
                    held=status.active,
                    step=status.decided,
                    phase=call["phase"],
                    leaving=call["leaving"] if identity == self.identity else rank in turn.leaving,
                    data=status_to_data(status),
                )
            )
        return Generation(self.number, tuple(members))

    def store(self) -> Any:
        return self.the_store

    def can_agree(self) -> bool:
        return True


@dataclass
class Failures:
    """Where a peer is lost next, once for each entry: connect, build, saves, barrier."""

    at: list[str] = field(default_factory=list)
    error: type[Exception] = PeerLost
    """What is raised there."""

    def maybe(self, place: str) -> None:
        if self.at and self.at[0] == place:
            self.at.pop(0)
            raise self.error(f"a peer is gone in {place}")


@dataclass
class FakeTransport:
    failures: Failures
    is_whole: bool = True
    transitions: list[Transition] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def connect(self, transition: Transition, store: Any) -> GenerationGroups:
        self.failures.maybe("connect")
        self.transitions.append(transition)
        members: Any = SimpleNamespace(barrier=lambda: self.failures.maybe("barrier"))
        groups: Any = None
        return GenerationGroups(groups, members, members)

    def abort(self, reason: str) -> None:
        self.aborted.append(reason)


@dataclass
class FakeBuilder:
    """Builds trainings that are where the holders, or the checkpoint, are."""

    rank: int
    failures: Failures
    checkpoint: int = 0
    """The step of the newest checkpoint."""
    loads: list[int | None] = field(default_factory=list)
    """`sound_until` of each load."""

    def build(
        self,
        transition: Transition,
        active: Any,
        connection: GenerationGroups,
        store: Any,
        *,
        sound_until: int | None,
    ) -> Built:
        self.failures.maybe("build")
        if not transition.keeps_state:
            self.loads.append(sound_until)
        if self.rank not in transition.after.stage_replicas.ranks:
            return Built(None, None, 0)
        recovery = transition.recovery
        if transition.keeps_state:
            progress = StepProgress(
                recovery.steps,
                recovery.outcome,
                recovery.steps,
                filled=not transition.after.incoming,
            )
            held: Any = FakeTraining(transition.after, progress)
            return Built(held, None, 0)
        step = self.checkpoint if transition.generation.number > 1 else 0
        built: Any = FakeTraining(transition.after, StepProgress(decided=step, updated=step))
        return Built(built, step, 0)


@dataclass
class FakeSaves:
    failures: Failures
    log: list[str] = field(default_factory=list)

    def abort(self, reason: str) -> None:
        self.log.append("abort")

    def cancel(self) -> None:
        self.log.append("cancel")

    def agree(self, training: Any, generation: Generation, *, loaded: bool) -> None:
        self.failures.maybe("saves")
        self.log.append("agree")


@dataclass
class FakeSession:
    """Commits steps, unless the script says otherwise."""

    lose_at: dict[int, str] = field(default_factory=dict)
    """By step, counted from 0, once: a peer is lost "before" its vote, or "after" it."""
    corrupt_at: set[int] = field(default_factory=set)
    """Steps, counted from 1, at which a comparison finds owners corrupt, once."""
    interrupt_compare: int = 0
    """How many comparisons end because a peer is lost."""
    interrupt_evaluation: int = 0
    """How many evaluations after a change end because a peer is lost."""
    requests: Callable[[int], Requests] = lambda step: Requests()
    steps: list[tuple[int, bool, bool]] = field(default_factory=list)
    changes: list[CompletedChange] = field(default_factory=list)
    recorded: list[tuple[CompletedChange, bool]] = field(default_factory=list)
    reported: list[CompletedChange] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    finished: bool = False
    stopped: list[tuple[int, bool]] = field(default_factory=list)
    training: Any = None
    at_loss: Callable[[Any], object] = lambda training: None
    """Called with the training of a step in which a peer is lost."""

    def step(self, step: int, *, change: bool, leave: bool) -> Outcome:
        self.steps.append((step, change, leave))
        progress = self.training.progress
        assert progress.decided == progress.updated == step
        lost = self.lose_at.pop(step, "")
        if lost:
            self.at_loss(self.training)
        if lost == "before":
            raise PeerLost("a peer is gone before the vote")
        outcome = replace(OUTCOME, requests=self.requests(step))
        progress.decided, progress.outcome = step + 1, outcome
        if lost == "after":
            raise PeerLost("a peer is gone after the vote")
        progress.updated += 1
        self.training.optimizer.step += 1
        progress.filled = not outcome.requests.filling
        return outcome

    def finish(self) -> None:
        self.finished = True

    def stop(self, step: int, requests: Requests, *, leaving: bool) -> None:
        self.stopped.append((step, requests.stop or leaving))

    def compare(self, step: int) -> bool:
        if self.interrupt_compare:
            self.interrupt_compare -= 1
            raise PeerLost("a peer is gone while state is compared")
        self.compared.append(step)
        if step in self.corrupt_at:
            self.corrupt_at.discard(step)
            return False
        return True

    def go_on(self, change: CompletedChange, training: Any) -> None:
        self.changes.append(change)
        self.training = training

    def record(self, change: CompletedChange, *, urgent: bool) -> None:
        self.recorded.append((change, urgent))

    def evaluate_interrupted_step(self, change: CompletedChange) -> dict[str, float]:
        if self.interrupt_evaluation and change.before is not None:
            self.interrupt_evaluation -= 1
            raise PeerLost("a peer is gone while the step before a change is evaluated")
        return {}

    def report_interrupted_step(
        self, change: CompletedChange, evaluated: Mapping[str, float]
    ) -> None:
        self.reported.append(change)


@dataclass
class Worker:
    """One worker's loop and recovery among fakes."""

    loop: ElasticLoop
    recovery: Recovery
    membership: FakeMembership
    transport: FakeTransport
    builder: FakeBuilder
    saves: FakeSaves
    session: FakeSession
    failures: Failures
    interruption: Interruption


def worker(
    config: RunConfig,
    script: list[Turn],
    *,
    rank: int = 0,
    incarnation: int = 0,
    session: FakeSession | None = None,
    checkpoint: int = 0,
    failures: list[str] | None = None,
    history: MembershipHistory | None = None,
    sleep: Callable[[float], None] = lambda seconds: None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Worker:
    """A worker of a run of `config`; the script follows the first agreement, of all its ranks."""
    identity = Identity(rank, incarnation)
    membership = FakeMembership(identity, set(range(config.parallel.ranks)) | {rank}, script)
    failing = Failures()
    if rank < config.parallel.ranks:
        script.insert(0, Turn())
    transport, builder = FakeTransport(failing), FakeBuilder(rank, failing, checkpoint)
    saves, interruption = FakeSaves(failing), Interruption()
    drives = Drives(membership, transport, builder, saves, interruption, clock=clock, sleep=sleep)
    recovery = Recovery(rank, config, plan_of(config), drives)
    session = session or FakeSession()
    loop = ElasticLoop(
        config,
        identity,
        recovery,
        session,
        membership,
        interruption,
        history,
        clock=clock,
        sleep=sleep,
    )
    made = Worker(
        loop, recovery, membership, transport, builder, saves, session, failing, interruption
    )
    failing.at.extend(failures or [])
    return made


def numbers(session: FakeSession) -> list[int]:
    """The steps that were begun, counted from 0."""
    return [step for step, _, _ in session.steps]
