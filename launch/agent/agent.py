"""The agent: one per node. It starts, watches, kills, replaces and ends its workers.

It also hosts the services that workers must not host: a rendezvous store, and a Lighthouse if none
is named. It takes no part in training, so a worker that dies or hangs takes no shared service with
it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from holdfast.elastic import (
    FaultError,
    Identity,
    MembershipEvent,
    RunEnd,
    coordination,
    cut_network,
    event_from_data,
    event_to_data,
    parse_identities,
    receive_message,
    send_message,
)
from holdfast.elastic.agreement import AcceptorState
from holdfast.launch.agent.fork_server import Ended, ForkServer, Started, WorkerMain
from holdfast.launch.agent.guard import Guard
from holdfast.launch.agent.machine_health import watched_errors
from holdfast.launch.agent.main_thread_queue import MainThreadQueue
from holdfast.launch.agent.other_nodes import OtherNodes
from holdfast.launch.agent.restarts import NO_PROGRESS_EXIT, Restarts
from holdfast.launch.agent.services import hosted_services
from holdfast.launch.agent.settings import AgentSettings
from holdfast.launch.agent.shutdown import INTERRUPTED, Shutdown
from holdfast.launch.agent.standing import Standing
from holdfast.launch.agent.worker_lines import WorkerLines
from holdfast.launch.agent.worker_slot import WorkerSlot
from holdfast.launch.processes import PASSED_ON
from holdfast.parallel.errors import ConfigError, Diverged, Stopped
from holdfast.parallel.files import scratch_folder
from holdfast.parallel.output import SAVING, Interrupts, tell_person

logger = logging.getLogger("holdfast.agent")

_TICK_S = 0.1


class Agent:
    """One node's agent. Construct before the process has threads; `run` in the main thread."""

    _others: OtherNodes
    """Set by `run`."""

    def __init__(
        self,
        settings: AgentSettings,
        main: WorkerMain,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Fork the fork server. Workers will call `main` with all modules imported by now.

        Args:
            clock: seconds since any moment, for restarts, deadlines and hangs.
        """
        self._settings, self._clock = settings, clock
        coordination()  # imported once here, not by every worker
        self._fork_server = ForkServer(main, patience_s=settings.limits.hang_timeout_s)
        self._slots: dict[int, WorkerSlot] = {}
        self._restarts = Restarts(settings.restarts)
        self._main_thread = MainThreadQueue()
        self._guard = Guard(settings, self._publish, self._main_thread.forwarding, clock)
        self.shutdown = Shutdown(interrupts=Interrupts(clock))
        self._standing = Standing(settings.apart_s, settings.ended)
        self._selector = selectors.DefaultSelector()
        self._lines = WorkerLines(clock=clock)

    def run(self, lighthouse: str = "") -> int:
        """Run the node until its workers have finished or cannot go on.

        Args:
            lighthouse: the address of the Lighthouse, if it was unknown at construction.
        Returns:
            0 if a worker has said that the run's end is reached and saved, or all have handed their
            state over after SIGTERM; 2 if one refused its configuration; 4 if training has
            diverged; 3 if the run stopped after SIGTERM, or workers were killed and are not
            replaced; `NO_PROGRESS_EXIT` if replacing them is pointless; 130 after
            SIGINT; otherwise the exit code of the last worker that failed.
        """
        with contextlib.ExitStack() as held:
            held.callback(self._fork_server.close)
            held.callback(self._main_thread.close)
            held.callback(self._guard.close)
            self._main_thread.on_signals(PASSED_ON, self._obey)
            self._selector.register(
                self._main_thread, selectors.EVENT_READ, lambda _: self._main_thread.run_calls()
            )
            folder = self._settings.folder or held.enter_context(scratch_folder())
            folder.mkdir(parents=True, exist_ok=True)
            # Not ended before the others go on: what was posted last may be in this node's store.
            services = held.enter_context(
                hosted_services(self._settings, lighthouse, self._processes)
            )
            self._others = OtherNodes(
                services,
                self._settings.node,
                on_event=self._main_thread.forwarding(self._deliver),
                on_silence=self._main_thread.forwarding(self._publish),
                lives=self._lives,
            )
            held.callback(lambda: self._others.close(over=self._is_awaited_by_none))
            held.enter_context(watched_errors(self._settings, self._main_thread, self._leave_sick))
            self._selector.register(self._fork_server, selectors.EVENT_READ, self._on_fork_server)
            for spec in self._settings.specs(services.membership, services.store, folder):
                self._slots[spec.rank] = WorkerSlot(spec, start_at_s=0.0)
            self._loop()
            members = [slot for slot in self._slots.values() if slot.is_member]
            left = self.shutdown.draining and all(slot.has_left for slot in members)
            self.shutdown.has_left = left and bool(members)
            self._fork_server.rest()
        return self.shutdown.exit_code

    def _processes(self) -> list[int]:
        """The processes that may use this node's services: its own, and its workers'."""
        return [os.getpid(), *(slot.pid for slot in tuple(self._slots.values()) if slot.pid > 0)]

    def _loop(self) -> None:
        while True:
            self._start_due()
            if not any(slot.pid or slot.start_at_s is not None for slot in self._slots.values()):
                return
            for key, _ in self._selector.select(_TICK_S):
                key.data(key.fileobj)
            if (cause := self._fork_server.look()) is not None:
                logger.error("the process that starts workers is killed: %s", cause)
            self._look_for_hangs()
            self._look_at_the_run()
            if self.shutdown.is_due(self._clock()):
                for slot in self._slots.values():
                    slot.kill(self.shutdown.cause)

    @property
    def _who(self) -> str:
        ranks = self._settings.ranks
        several = "ranks" if len(ranks) > 1 else "rank"
        return f"node {self._settings.node} ({several} {', '.join(map(str, ranks))})"

    # Workers: start, end, replace.

    def _start_due(self) -> None:
        now_s = self._clock()
        may = self._settings.may_start or (lambda _: True)
        for slot in self._slots.values():
            if slot.start_at_s is not None and slot.start_at_s <= now_s and may(slot.spec):
                slot.begin()
                try:
                    slot.channel = self._fork_server.start(
                        slot.spec, self._settings.log(slot.spec.rank)
                    )
                except BrokenPipeError:
                    self._lose_fork_server()
                    return
                self._selector.register(slot.channel, selectors.EVENT_READ, self._on_channel)

    def _on_fork_server(self, _: Any) -> None:
        report = self._fork_server.receive()
        if report is None:
            self._lose_fork_server()
        elif isinstance(report, Started):
            slot = self._slots[report.rank]
            slot.pid, slot.descriptor = report.pid, report.descriptor
            logger.info("rank %s is process %d", slot.spec.identity, report.pid)
        else:
            self._on_end(self._slots[report.rank], report)

    def _lose_fork_server(self) -> None:
        """End the node: the fork server was killed, and its workers with it."""
        cause = f"node {self._settings.node}: the process that starts its workers is gone"
        logger.error("%s, and with it all workers", cause)
        self.shutdown.code = Stopped.exit_code
        for slot in self._slots.values():
            if slot.pid:
                self._publish(slot.event("ended", cause, slot.silent_s))
                self._others.report_on_behalf_of(slot.spec, cause, slot.evidence)
            slot.pid, slot.start_at_s, slot.is_inside = 0, None, False

    def _on_end(self, slot: WorkerSlot, end: Ended) -> None:
        os.close(slot.descriptor)
        slot.descriptor, slot.pid, slot.is_inside = -1, 0, False
        while slot.channel is not None and (message := receive_message(slot.channel)) is not None:
            self._on_message(slot, message)
        slot.hang_up(self._selector)
        if slot.finished:
            self._finish(slot)
        else:
            self._replace(slot, end)

    def _finish(self, slot: WorkerSlot) -> None:
        """Handle a worker that reached the end of the run."""
        logger.info("rank %s has finished", slot.spec.identity)
        self.shutdown.finished = True
        self._settings.note_end(RunEnd(0))
        self._stop_within(self._settings.exit_s, "the run has ended")
        for other in self._slots.values():
            if not other.is_member:
                other.kill("the run has ended without it")

    def _replace(self, slot: WorkerSlot, end: Ended) -> None:
        """Report a failed worker to the others and on its behalf, and start the next one."""
        stopping = self.shutdown.kill_at_s is not None
        cause = slot.cause_of_end(end.code)
        logger.warning("rank %s: %s", slot.spec.identity, cause)
        if end.code > 0:
            self.shutdown.failed_with = end.code
        self._guard.note_failure(slot, self._others.generation)
        self._publish(slot.event("ended", cause, slot.silent_s))
        founder = slot.spec.founder and slot.spec.acceptor.read() == AcceptorState()
        if not founder:
            self._others.report_on_behalf_of(slot.spec, cause, slot.evidence)
        known = self._settings.failure(slot.spec.rank, end.code) if self._settings.failure else None
        if end.code == INTERRUPTED and not self.shutdown.draining:
            # All ranks have saved what is saved.
            self.shutdown.code = INTERRUPTED
            self._settings.note_end(RunEnd(end.code, cause))
            self._stop_within(self._settings.exit_s, "the run was interrupted")
            return
        if stopping:
            return
        if self._is_left_out(slot, end.code):
            return tell_person(f"rank {slot.spec.identity} is not let in: {known or cause}")
        refused = end.code in (ConfigError.exit_code, Diverged.exit_code)
        if refused or (known is not None and self._repeats(slot, known)):
            alone = refused and slot.spec.founder  # else the others may be well
            alone = alone or not self._others.are_known_to_train(self._slots)
            if alone and self._settings.founder:
                self._settings.note_end(RunEnd(end.code, known or cause))
            self._abort(end.code, f"it cannot go on: {known or cause}")
        elif slot.is_incurable and end.code > 0:
            self._abort(end.code, f"rank {slot.spec.identity}: {cause}")
        elif slot.is_sick:
            tell_person(f"rank {slot.spec.identity} is not replaced on this machine: {cause}")
        elif self._settings.respawn:
            delay_s = self._restarts.delay_s(slot.spec.rank)
            if delay_s is None:
                why = f"was restarted {self._settings.restarts.limit} times with no step committed"
                return self._abort(NO_PROGRESS_EXIT, f"rank {slot.spec.rank} {why} in between")
            incarnation = slot.spec.incarnation + 1
            slot.spec = replace(slot.spec, incarnation=incarnation, founder=founder)
            slot.start_at_s = self._clock() + delay_s

    def _is_left_out(self, slot: WorkerSlot, code: int) -> bool:
        """Whether a newcomer has refused to take part, on a node that goes on without it."""
        others = any(other.pid > 0 for other in self._slots.values())
        return code == ConfigError.exit_code and not slot.spec.founder and others

    def _repeats(self, slot: WorkerSlot, reason: str) -> bool:
        """Whether a rank fails again as before, while no other worker of this node trains."""
        again = self._restarts.repeats(slot.spec.rank, reason)
        return again and not any(other.is_inside for other in self._slots.values())

    def _abort(self, code: int, why: str) -> None:
        """End the node with this exit code, at once."""
        logger.warning("node %s ends: %s", self._settings.node, why)
        self.shutdown.code = code
        self._stop_within(0.0, why)

    def _stop_within(self, seconds: float, why: str) -> None:
        """Start no more workers, and kill those that live after this time."""
        self.shutdown.within(seconds, self._clock(), why)
        for slot in self._slots.values():
            slot.start_at_s = None

    def _look_for_hangs(self) -> None:
        slots = self._slots.values()
        self._guard.hangs.look(slots)
        causes = self._guard.hangs.causes(slots, self._clock(), draining=self.shutdown.draining)
        for rank, cause in causes.items():
            self._guard.fence(self._slots[rank], cause, self._others.generation)
        self._guard.kill_due()
        others = [slot for slot in slots if slot.spec.rank not in causes]
        for event in self._guard.hangs.new_waits(others, self._others.generation):
            logger.warning("rank %s %s", event.identity, event.cause)
            self._publish(event)
            waited_for = {identity.rank for identity in parse_identities(event.peers)}
            self._slots[event.identity.rank].waits_for = waited_for - self._slots.keys()
        waited_for = set[int]().union(*(slot.waits_for for slot in slots if slot.is_inside))
        for event in self._others.lost_to_a_cut(waited_for, self._clock()):
            logger.warning("rank %s: %s", event.identity, event.cause)
            self._deliver(event)

    def _look_at_the_run(self) -> None:
        """End with the run, or once this node has had no part in it for too long."""
        held_back = self._settings.may_start is not None
        end = self._standing.look(self._slots.values(), self._clock(), held_back=held_back)
        if end is None or self.shutdown.kill_at_s is not None:
            return
        self.shutdown.reason = end.reason and f"node {self._settings.node} ends: {end.reason}"
        self.shutdown.finished = end.code == 0
        self._abort(end.code, end.reason or "the run has ended")

    # Messages of workers, and events of all nodes.

    def _on_channel(self, channel: Any) -> None:
        slot = next((slot for slot in self._slots.values() if slot.channel is channel), None)
        if slot is None:
            return  # it has ended meanwhile
        message = receive_message(channel)
        if message is None:
            slot.hang_up(self._selector)
        else:
            self._on_message(slot, message)

    def _on_message(self, slot: WorkerSlot, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "committed":
                slot.waits_for = frozenset()
                self._restarts.committed(message["step"])
            case "agreeing":
                slot.is_inside, slot.waits_for = False, frozenset()
                self._guard.hangs.has_left_its_step(slot.spec.identity)
            case "waiting":
                if slot.spec.rank == min(r for r, s in self._slots.items() if not s.is_inside):
                    tell_person(f"node {self._settings.node}: {message['line']}")
            case "queued":
                self._standing.note_queued(self._clock())
            case "event":
                self._publish(event_from_data(message["event"]))
            case "generation":
                if message["number"] >= self._others.generation:
                    slot.is_member, slot.is_inside, slot.left_out_s = True, True, None
                if self._settings.is_over is not None and not self._others.generation:
                    tell_person(f"{self._who} takes part; SIGTERM lets it hand over and leave")
                self._enter(message)
            case "finished":
                slot.finished = True
            case "line":
                self._lines.show(message["text"])
            case "joining":
                if self._others.generation:
                    cause = "a new worker wants to take part"
                    self._publish(slot.event("joining", cause, 0.0))
            case "left":
                slot.has_left = True
            case "sick":
                slot.is_sick = True
            case "incurable":
                slot.is_incurable = True
            case "cut":
                try:
                    cut_network(message["seconds"])
                except FaultError as error:
                    logger.error("no fault: %s", error)
            case unknown:
                raise AssertionError(f"rank {slot.spec.identity} sent a message {unknown!r}")

    def _enter(self, message: dict[str, Any]) -> None:
        """Meet the other agents in the generation that a worker has reported."""
        if message["number"] <= self._others.generation:
            return
        members = parse_identities(message["members"])
        self._guard.hangs.enter(message["number"], members)
        for slot in self._slots.values():
            if slot.is_member and slot.spec.identity not in members:
                slot.is_member, slot.left_out_s = False, self._clock()
        self._others.enter(message)

    def _publish(self, event: MembershipEvent) -> None:
        """Send an event to this node's workers at once, and to all other nodes."""
        self._deliver(event)
        self._others.post(event)

    def _deliver(self, event: MembershipEvent) -> None:
        """Send an event to this node's workers, and act on events for this agent."""
        self._guard.hangs.hear(event, self._slots.values(), self._clock())
        if event.kind == "suspected" and event.generation == self._others.generation:
            self._guard.look_at_waiting(event, self._slots.values())
        message = {"kind": "event", "event": event_to_data(event)}
        for slot in self._slots.values():
            if slot.channel is not None:
                send_message(slot.channel, message)
            if slot.spec.identity != event.identity:
                continue
            # A worker that runs here and that others do not hear of is cut off, not hung.
            if event.kind == "silent" and not self._lives(event.identity):
                self._guard.fence(slot, event.cause, self._others.generation)

    def _lives(self, identity: Identity) -> bool:
        """Whether a worker of this node has run lately; from any thread."""
        slot = self._slots.get(identity.rank)
        if slot is None or slot.spec.identity != identity:
            return False
        return not self._guard.hangs.is_still(slot.spec, self._settings.membership.silence_s)

    # Signals, and the end.

    @property
    def _is_awaited_by_none(self) -> bool:
        return (
            self.shutdown.needs_no_report or self._others.are_known_to_train(self._slots) is False
        )

    def _obey(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._drain()
        elif number == signal.SIGINT:
            self._interrupt()
        else:
            for slot in self._slots.values():
                slot.signal(number)

    def _interrupt(self) -> None:
        """Have the run saved and ended, or a node that has joined it leave; at once if again."""
        already = self.shutdown.interrupts.came
        if self.shutdown.interrupts.is_second():
            self._abort(INTERRUPTED, "it was interrupted again")
        if already:
            return
        members = [slot for slot in self._slots.values() if slot.is_member]
        if not self._settings.founder:
            self._drain()
            return
        if members and 0 in self._slots:
            tell_person(SAVING)
        self.shutdown.code = INTERRUPTED
        # There is a person to end what takes too long.
        self._stop_within(math.inf, "it was interrupted")
        for slot in self._slots.values():
            if slot in members:
                slot.signal(signal.SIGINT)
            else:
                slot.kill("its node was interrupted before it took part")

    def _leave_sick(self, error: str) -> None:
        """Leave the run because of an error of this machine, if others can go on with it.

        A node that is alone in the run goes on: it would lose the run, and not only a node.
        """
        if self.shutdown.draining or self.shutdown.kill_at_s is not None:
            return
        if not self._others.are_known_to_train(self._slots):
            told = "goes on, as no other node trains, though its machine reports"
            tell_person(f"{self._who} {told}: {error}")
            return
        why = f"leaves, as its machine reports: {error}"
        tell_person(f"{self._who} {why}")
        self._drain(why)

    def _drain(self, why: str = "is to be shut down") -> None:
        """Announce that this node leaves.

        The other nodes let its workers leave; workers that still live at the deadline are killed.
        """
        if self.shutdown.draining:
            return
        self.shutdown.draining = True
        self._stop_within(self._settings.exit_s, f"it {why}")
        for slot in self._slots.values():
            if slot.is_member:
                cause = f"node {self._settings.node} {why}"
                self._publish(slot.event("leaving", cause, self._settings.exit_s))
            else:
                slot.kill(f"its node {why}")
