"""The guard of a node's workers: those that hang are found, looked at, and killed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from holdfast.elastic import Identity, MembershipEvent, liveness_s, send_message
from holdfast.launch.agent.examination import LOOK_S, Examiner, Findings
from holdfast.launch.agent.liveness import HangWatch
from holdfast.launch.agent.settings import AgentSettings
from holdfast.launch.agent.worker_slot import WorkerSlot

logger = logging.getLogger("holdfast.agent")

_STOPPED = 0.75
"""The share of the time-out of heartbeats after which a stopped worker is looked at: before others
miss it, so that what is found is part of the incident."""
_STILL_S = 0.5
"""Seconds without a sign of life after which a worker is still."""
_LATE_S = 0.25
"""Seconds beyond `LOOK_S` after which a worker is killed, whatever was found."""


class Guard:
    """Kills workers that hang, once they have been looked at. The agent's main thread uses it."""

    def __init__(
        self,
        settings: AgentSettings,
        publish: Callable[[MembershipEvent], None],
        forwarding: Callable[[Callable[[Findings], None]], Callable[[Findings], None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No worker is guarded yet.

        Args:
            publish: tells all nodes of an event.
            forwarding: makes a function for other threads from one for the main thread.
        """
        self.hangs = HangWatch(
            settings.node,
            settings.limits,
            stopped_s=_STOPPED * settings.membership.silence_s,
            read=settings.read_record,
            clock=clock,
        )
        self._publish, self._clock = publish, clock
        self._node = settings.node
        self._examiner = Examiner(settings.incidents, settings.node, forwarding(self._report))
        self._condemned: dict[Identity, tuple[WorkerSlot, str, float]] = {}
        """By worker: the cause for which it is killed, and until when it may be looked at."""
        self._heard_of: set[Identity] = set()
        """The suspected workers of all nodes so far."""

    def fence(self, slot: WorkerSlot, cause: str, generation: int) -> None:
        """Kill a worker that hangs, once it has been looked at; see `LOOK_S`.

        Args:
            generation: the newest one, for the agents of workers that wait for it.
        """
        identity = slot.spec.identity
        if identity in self._condemned or slot.killed_for or slot.descriptor < 0:
            return
        beat_s = liveness_s(slot.spec.liveness)
        if beat_s is not None and time.monotonic() - beat_s > _STILL_S:
            slot.still_since_s = beat_s
        name = self._look_at(slot, cause, identity)
        if not name:
            slot.kill(cause)
            return
        slot.evidence = name
        logger.warning("rank %s is looked at before it is killed: %s", identity, cause)
        self._condemned[identity] = (slot, cause, self._clock() + LOOK_S + _LATE_S)
        self._publish(
            MembershipEvent(
                "suspected", identity, cause, 0.0, self._node, generation, evidence=name
            )
        )

    def kill_due(self) -> None:
        """Kill the workers that have been looked at for too long."""
        now_s = self._clock()
        for identity, (slot, cause, end_s) in tuple(self._condemned.items()):
            if slot.spec.identity != identity or slot.descriptor < 0:
                del self._condemned[identity]  # it has ended meanwhile
            elif now_s >= end_s:
                self._kill(slot, cause)

    def look_at_waiting(self, event: MembershipEvent, slots: Iterable[WorkerSlot]) -> None:
        """Look at the workers that wait for a suspected one.

        Args:
            slots: the workers of this node.
        """
        if event.identity in self._heard_of:  # posted events come back
            return
        self._heard_of.add(event.identity)
        for slot in slots:
            other = slot.spec.identity != event.identity and slot.is_inside
            if other and self.hangs.waits_for(slot.spec.identity, event.identity.rank):
                self._look_at(slot, f"it waits for rank {event.identity}", event.identity)

    def note_failure(self, slot: WorkerSlot, generation: int) -> None:
        """Keep and tell of the evidence that an ended worker has left, if it has."""
        findings = self._examiner.keep(slot.spec)
        if findings is not None:
            slot.evidence = findings.name
            self._tell(findings, generation)

    def close(self) -> None:
        """Wait for what is still written, for a short time."""
        self._examiner.close()

    def _look_at(self, slot: WorkerSlot, reason: str, about: Identity) -> str:
        slot.spec.testimony.unlink(missing_ok=True)
        if slot.channel is not None and self._examiner.keeps:
            send_message(slot.channel, {"kind": "examine", "fully": about == slot.spec.identity})
        return self._examiner.begin(
            slot.spec, slot.pid, slot.descriptor, about=about, reason=reason
        )

    def _report(self, findings: Findings) -> None:
        self._tell(findings, findings.evidence.generation)
        condemned = self._condemned.get(findings.spec.identity)
        if condemned is not None and findings.evidence.role == "hung":
            slot, cause, _ = condemned
            if slot.spec.identity == findings.spec.identity:
                self._kill(slot, cause)

    def _kill(self, slot: WorkerSlot, cause: str) -> None:
        del self._condemned[slot.spec.identity]
        slot.kill(cause)

    def _tell(self, findings: Findings, generation: int) -> None:
        identity, evidence = findings.spec.identity, findings.evidence
        place = evidence.place or "not known"
        logger.warning("rank %s (%s) was in %s: %s", identity, evidence.role, place, findings.name)
        self._publish(
            MembershipEvent(
                "examined", identity, place, 0.0, self._node, generation, evidence=findings.name
            )
        )
