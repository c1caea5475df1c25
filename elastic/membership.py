"""A worker's membership of its run: its events, and agreement on each new generation."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch.distributed import Store

from holdfast.elastic.agreement import Attendance, Report, Verdict, generation_of
from holdfast.elastic.channel import WorkerChannel
from holdfast.elastic.event_log import EventLog
from holdfast.elastic.generation import (
    Generation,
    Identity,
    format_identities,
)
from holdfast.elastic.lighthouse import (
    Heartbeats,
    LighthouseAway,
    RoundTimeout,
    answers,
    heartbeat_ages,
    replica_id,
)
from holdfast.elastic.membership_events import MembershipEvent, event_from_data, event_to_data
from holdfast.elastic.quorum_client import PAUSE_S, QuorumClient
from holdfast.elastic.roll import DeadNodes
from holdfast.elastic.store import StoreClients
from holdfast.elastic.teller import Teller, ends_of
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.parallel.errors import MembershipError, Minority
from holdfast.parallel.links import STORE_TIMEOUT_S, StoreAccess, Tunnels
from holdfast.parallel.output import Waiting

_PAUSE_UNREACHABLE_S = 0.1
_LAST_WORD_S = 10.0
"""Seconds for which the last word of a worker waits for an agent that does not read."""
_ASK_AGAIN_S = 1.0
"""The interval at which a worker that is not a member yet asks to join."""
_LOOK_AGAIN_S = 2.0
"""The interval at which it looks whether others train meanwhile."""


class Membership:
    """One worker's part in the membership of its run.

    A worker calls `agree` once to begin, and again whenever the set of ranks changes: at once after
    a loss (`on_urgent`, or an operation that raises `PeerLost`), and at the end of a step when
    ranks join or leave (`wanted`). Between these calls it only sends heartbeats to the Lighthouse,
    so training goes on while the Lighthouse is away. Only `wanted` may be called from other
    threads.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        channel: socket.socket | None = None,
        *,
        examine: Callable[[bool], None] = lambda _: None,
        store_timeout_s: float = STORE_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take the right to report as this worker. Local.

        Args:
            channel: the channel to this worker's agent; None without an agent.
            examine: called in another thread when the agent asks for evidence about this worker;
                True: it is going to be killed, and all counts.
            store_timeout_s: the time-out of operations on `store`.
        Raises:
            MembershipError: another process reports as this worker.
        """
        self.spec, self._clock, self._sleep = spec, clock, sleep
        self.generation: Generation | None = None
        """The newest generation that `agree` has returned."""
        self._log = EventLog(spec.identity)
        self._dead_nodes = DeadNodes(spec, clock)
        self._heartbeats: Heartbeats | None = None
        self._resources = contextlib.ExitStack()
        tunnels = self._resources.enter_context(contextlib.closing(Tunnels()))
        access = StoreAccess(tunnels, spec.settings.store_key)
        self._stores = StoreClients(access, store_timeout_s)
        try:
            self._resources.enter_context(spec.acceptor.held())
        except BlockingIOError as error:
            raise MembershipError(
                f"another process is rank {spec.identity} of run {spec.settings.run}; end it first"
            ) from error
        self._quorum = QuorumClient(spec.identity, spec.settings, spec.acceptor)
        self._teller = Teller(self._quorum, spec.settings.call_s, self._log.hear)
        self._channel: WorkerChannel | None = None
        if channel is not None:
            hear = partial(self._hear, examine)
            self._channel = WorkerChannel(channel, spec.liveness, hear)
            self._resources.callback(self._channel.close)

    def hush(self) -> None:
        """Report no loss any more until the next call of `agree` has ended.

        That agreement knows of what is heard meanwhile. A loss in the old generation that was
        reported after it was left would end the new one.
        """
        self._log.begin_agreement()

    def agree(
        self,
        *,
        step: int,
        phase: str,
        urgent: bool = True,
        leaving: bool = False,
        data: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Generation:
        """Agree with the other workers on the next generation. Collective over all live workers.

        If it raises, the worker must not go on, except after a call with `urgent` false: the worker
        may then go on in its old generation, in which no step can be committed once some have left
        it.

        Args:
            step: the number of steps that this worker has committed.
            phase: the phase of the step; passed on to the others unchanged.
            urgent: True: the step cannot be finished, and the others are told to leave theirs too.
                False: all call this at the end of the same step.
            leaving: whether this worker hands its state over with this change and then leaves.
            data: further values for the others, as JSON values.
            timeout_s: the time after which this worker gives up; None: that of its settings. It
                does not run while others train without it and will admit it.
        Returns:
            The new generation, equal on every member.
        Raises:
            Superseded: the others went on without this worker; it must end, or begin as a new one.
            Minority: no majority of the last generation could be reached in time.
            MembershipError: no agreement in time for another reason, such as no Lighthouse.
        """
        held = self.generation.number if self.generation is not None else 0
        report = replace(
            self._blank_report(held), step=step, phase=phase, leaving=leaving, data=dict(data or {})
        )
        if held:
            kind = "disturbed" if urgent else "agreeing"
            self._tell_all(MembershipEvent(kind, self.spec.identity, phase, generation=held))
        self._teller.leave()
        self._log.begin_agreement()
        self._tell("agreeing")
        generation = None
        try:
            limit_s = self.spec.settings.agree_s if timeout_s is None else timeout_s
            generation = self.generation = self._rounds(report, limit_s)
        finally:
            self._dead_nodes.close()
            self._log.end_agreement(generation)
        self._teller.enter(generation)
        self._tell(
            "generation",
            number=generation.number,
            store=generation.store,
            prefix=generation.prefix,
            members=format_identities(generation.identities),
            nodes=list(dict.fromkeys(member.node for member in generation.members)),
        )
        return generation

    def _blank_report(self, held: int) -> Report:
        spec, settings = self.spec, self.spec.settings
        return Report(
            spec.identity,
            founder=spec.founder,
            world_size=settings.world_size,
            min_ranks=settings.min_ranks,
            node=spec.node,
            machine=spec.machine,
            store=spec.store,
            held=held,
        )

    def _rounds(self, report: Report, timeout_s: float) -> Generation:
        """Take part in rounds until there is agreement."""
        settings = self.spec.settings
        held = self.generation is not None
        patience = _Patience(timeout_s, self._clock, lambda line: self._tell("waiting", line=line))
        attendance = Attendance(settings.patience_s, timeout_s, self._clock)
        began_s = self._clock()
        last: Verdict | None = None
        trouble: MembershipError | None = None
        while (left_s := patience.left_s(_reason(last, trouble))) > 0:
            if trouble is not None or (last is not None and last.minority):
                # This worker was cut off: the missing ones may be back as soon as it is.
                attendance.begin_again()
                self._log.forget_silence()
            if not held and patience.asks_again():
                self._tell("joining")
            lost = self._log.lost | attendance.overdue(self._quorum.acceptor.members)
            try:
                self._beat()
                verdict, reports = self._quorum.round(
                    replace(report, lost=lost), min(left_s, settings.call_s)
                )
            except RoundTimeout:
                trouble = None
                continue
            except LighthouseAway as error:
                trouble = error
                self._quorum.say(str(error))
                self._sleep(min(_PAUSE_UNREACHABLE_S, left_s))
                continue
            attendance.note(reports)
            last, trouble = verdict, None
            if verdict.outcome == "agreed":
                self._hear_of_ends(reports)
                return verdict.learnt or generation_of(verdict.acceptor, reports)
            if verdict.outcome == "wait":
                if verdict.minority:
                    self._dead_nodes.look(self.generation, reports)
                elif not held and patience.looks_again() and self._others_train(reports):
                    patience.begin_again()
                    self._tell("queued")
                self._sleep(PAUSE_S)
        took_s = self._clock() - began_s
        where = f"rank {self.spec.identity}: no agreement on who takes part within {took_s:.0f} s"
        if last is not None and last.minority:
            raise Minority(f"{where}: {last.reason}; this side stops so that only one goes on")
        raise MembershipError(f"{where}: {_reason(last, trouble) or 'no round was held'}")

    def _hear_of_ends(self, reports: Mapping[Identity, Report]) -> None:
        """Note why processes have ended, as their agents report it; the event may come later."""
        for event in ends_of(reports).values():
            self._log.hear(event)

    def _others_train(self, reports: Mapping[Identity, Report]) -> bool:
        """Whether workers live that are in no round: they train, and admit others after a step."""
        settings = self.spec.settings
        try:
            ages = heartbeat_ages(settings.lighthouse, settings.run)
        except LighthouseAway:
            return False
        return any(age_s < settings.silence_s for i, age_s in ages.items() if i not in reports)

    def on_urgent(self, call: Callable[[MembershipEvent], None] | None) -> None:
        """Set the function that is called, in another thread, as soon as a member is lost.

        It should release the worker's waits (abort its communicators), and must not block. It is
        not called during `agree`, nor after `hush`, and afterwards it is called for members lost
        meanwhile.
        """

        def disturbed(event: MembershipEvent) -> None:
            self._teller.tell()
            if call is not None:
                call(event)

        self._log.on_urgent(disturbed)

    @property
    def wanted(self) -> tuple[MembershipEvent, ...]:
        """The joining and leaving workers since the last `agree`, which wait for the end of a step.

        Workers hear of one at different steps. So combine `bool(wanted)` over all of them, for
        example in the all-reduce of the step's vote, and call `agree` after the step in which it is
        true.
        """
        return self._log.wanted

    def can_agree(self) -> bool:
        """Whether the Lighthouse is there; until then a change that can wait is put off."""
        return answers(self.spec.settings.lighthouse)

    def drain_events(self) -> tuple[MembershipEvent, ...]:
        """All events since the last call, for the records; outdated ones are removed."""
        return self._log.drain()

    def committed(self, step: int) -> None:
        """Note that `step` steps are committed, so that all members are in this generation.

        The agent is told that the run makes progress.
        """
        if not self._log.disturbed:
            self._teller.rest()
        self._tell("committed", step=step)

    def incurable(self) -> None:
        """Tell the agent that this worker ends for a reason that no replacement can cure."""
        self._tell("incurable")

    def sick(self) -> None:
        """Tell the agent that this worker's machine computes wrongly: nothing replaces it here."""
        self._tell("sick")

    def left(self) -> None:
        """Tell the agent that this worker has handed its state over and ends."""
        if self._channel is not None:
            self._channel.send("left", patience_s=_LAST_WORD_S)

    def finished(self) -> None:
        """Tell the agent that this worker is done: the last step, its save and its records.

        A worker that ends without this word counts as lost, whatever its exit code.
        """
        if self._channel is not None:
            self._channel.send("finished", patience_s=_LAST_WORD_S)

    def tell(self, line: str) -> None:
        """Have the agent show the user a line."""
        self._tell("line", text=line)

    def cut_off(self, seconds: float) -> None:
        """Have the agent cut this node off from the others for a time: a fault on purpose."""
        self._tell("cut", seconds=seconds)

    def store(self) -> Store:
        """A client of the present generation's store, below its prefix. The connection is kept.

        Raises:
            PeerLost: the store's host is gone.
            MembershipError: there is no generation yet.
        """
        if self.generation is None:
            raise MembershipError("no generation has been agreed on; call agree first")
        return self._stores.at(self.generation.store, self.generation.prefix)

    def close(self) -> None:
        """Stop the heartbeats, and give up the right to report."""
        self._teller.leave()
        self._dead_nodes.close()
        if self._heartbeats is not None:
            self._heartbeats.close()
        self._resources.close()

    def _beat(self) -> None:
        if self._heartbeats is None:
            settings = self.spec.settings
            name = replica_id(settings.run, self.spec.identity)
            self._heartbeats = Heartbeats(settings.lighthouse, name, settings.heartbeat_ms)
            if self.generation is None:
                self._tell("joining")

    def _tell_all(self, event: MembershipEvent) -> None:
        self._tell("event", event=event_to_data(replace(event, node=self.spec.node)))

    def _tell(self, kind: str, **fields: Any) -> None:
        if self._channel is not None:
            self._channel.send(kind, **fields)

    def _hear(self, examine: Callable[[bool], None], message: dict[str, Any]) -> None:
        """Handle a message of the agent, in the channel's thread."""
        if message["kind"] == "examine":
            examine(message["fully"])
            return
        assert message["kind"] == "event", f"an agent sent a message {message['kind']!r}"
        event = event_from_data(message["event"])
        if event.kind == "agreeing":
            self._teller.tell(event.generation)
        else:
            self._log.hear(event)


class _Patience:
    """The times of one agreement: its limit, and when this worker asks or looks again."""

    def __init__(
        self, limit_s: float, clock: Callable[[], float], tell: Callable[[str], None]
    ) -> None:
        self._limit_s, self._clock, self._tell = limit_s, clock, tell
        self._waiting = Waiting("the others to agree", limit_s, tell=tell, clock=clock)
        self._asked_s = self._looked_s = clock()

    def left_s(self, reason: str) -> float:
        """Seconds that are left. Tells once why there is no agreement yet."""
        return self._waiting.left_s(reason)

    def begin_again(self) -> None:
        """Begin the limit anew."""
        self._waiting = Waiting(
            "the others to admit it", self._limit_s, tell=self._tell, clock=self._clock
        )

    def asks_again(self) -> bool:
        """Whether it is time to ask again to join."""
        if due := self._clock() > self._asked_s + _ASK_AGAIN_S:
            self._asked_s = self._clock()
        return due

    def looks_again(self) -> bool:
        """Whether it is time to look again for workers that are in no round."""
        if due := self._clock() > self._looked_s + _LOOK_AGAIN_S:
            self._looked_s = self._clock()
        return due


def _reason(last: Verdict | None, trouble: MembershipError | None) -> str:
    """Why there is no agreement yet, as far as it is known."""
    return str(trouble) if trouble is not None else last.reason if last is not None else ""
