"""The liveness check: how an agent decides, from outside a worker, that the worker hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.elastic import (
    FairClock,
    HangJudge,
    HangLimits,
    Identity,
    MembershipEvent,
    Suspicion,
    Wait,
    WorkerSpec,
    format_identities,
    is_excused,
    liveness_s,
    overdue_s,
    wait_of,
)
from holdfast.launch.agent.worker_slot import WorkerSlot
from holdfast.parallel.comm import FlightRecord, read_record

LEFT_OUT_S = 10.0
"""Seconds that a worker may live after the others went on without it; it ends by itself."""
LEAVING_S = 15.0
"""Seconds that a worker may take to leave a step, besides what any wait may last: a store that it
asks may lie on a node that is cut off, and a link to such a node ends after 12 s."""


def record_of(spec: WorkerSpec) -> FlightRecord | None:
    """A worker's flight record; None if it has written none that can be read."""
    try:
        return read_record(spec.flight_record)
    except (OSError, ValueError):
        return None


def silence(
    pid: int, beat_s: float | None, fair: FairClock, *, stopped_s: float, hung_s: float
) -> str | None:
    """The reason why a process counts as stopped or hung, from its last sign of life.

    Args:
        beat_s: the monotonic time at which it last ran; None: it has not begun.
        stopped_s: seconds that a signal may stop it.
        hung_s: seconds that something, such as a held lock, may keep it from running.
    """
    if beat_s is None:
        return None
    age_s = fair.since(beat_s)
    if age_s > stopped_s and is_stopped(pid):
        return f"stopped by a signal for {age_s:.1f} s"
    if age_s > hung_s:
        return f"hung: its interpreter has not run for {age_s:.1f} s"
    return None


def is_stopped(pid: int) -> bool:
    """Whether a process is in state T.

    The state follows the last `)` of the line in its stat file.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return line.rpartition(")")[2].split()[0] == "T"


def starved_s(pid: int) -> float:
    """Seconds that a process' main thread has been ready and without a processor; 0 if unknown."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _nothing_yet(slot: WorkerSlot) -> FlightRecord:
    """The record of a worker that has not begun one: it has not sent a message yet."""
    return FlightRecord(slot.spec.rank, slot.pid, 0, 0, 0.0, ())


@dataclass(slots=True)
class _Watched:
    """What the watch remembers of one worker."""

    pid: int
    fair: FairClock
    starved_s: float
    told: frozenset[int] = field(default=frozenset())
    """The ranks that the others know it to wait for too long."""


class HangWatch:
    """Finds the workers of a node that hang, and those that wait for others too long."""

    def __init__(
        self,
        node: str,
        limits: HangLimits,
        *,
        stopped_s: float,
        read: Callable[[WorkerSpec], FlightRecord | None] = record_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch the workers of a node.

        Args:
            stopped_s: seconds that a signal may stop a worker.
            read: returns the flight record of a worker, if it has one.
            clock: the clock of the records.
        """
        self._node, self._limits, self._stopped_s = node, limits, stopped_s
        self._read, self._clock = read, clock
        self._judge = HangJudge()
        self._watched: dict[Identity, _Watched] = {}
        self._records: dict[Identity, FlightRecord] = {}
        self._members: Collection[Identity] = ()
        self._disturbed: dict[Identity, tuple[float, str]] = {}
        """Since when workers ought to leave their step, and why; while they have not."""

    def enter(self, generation: int, members: Collection[Identity]) -> None:
        """Enter a generation; waits of earlier ones no longer count."""
        self._judge.enter(generation)
        self._members = members
        for watched in self._watched.values():
            watched.told = frozenset()

    def hear(self, event: MembershipEvent, slots: Iterable[WorkerSlot], now_s: float) -> None:
        """Note a wait that is too long or has ended, and a reason for workers to leave their step.

        Args:
            slots: the workers of this node.
        """
        if event.kind == "waiting":
            self._judge.hear(event, now_s)
        elif event.lost:
            self._judge.forget(event.identity)
        of_now = event.generation in (0, self._judge.generation)
        if event.calls and of_now and event.identity in self._members:
            why = f"rank {event.identity} is {event.kind} ({event.cause})"
            for slot in slots:
                if slot.is_inside and slot.spec.identity != event.identity:
                    self._disturbed.setdefault(slot.spec.identity, (now_s, why))

    def has_left_its_step(self, identity: Identity) -> None:
        """Note that a worker comes to agree."""
        self._disturbed.pop(identity, None)

    def look(self, slots: Iterable[WorkerSlot]) -> None:
        """Read the signs of life of all workers, for `causes` and `new_waits`."""
        running = {slot.spec.identity: slot for slot in slots if slot.descriptor >= 0}
        for identity in self._watched.keys() - running.keys():
            del self._watched[identity]
            self.has_left_its_step(identity)
        self._records = {}
        for identity, slot in running.items():
            watched = self._watched.get(identity)
            now_starved_s = starved_s(slot.pid)
            if watched is None:
                watched = _Watched(slot.pid, FairClock(self._clock), now_starved_s)
                self._watched[identity] = watched
            watched.fair.look(now_starved_s - watched.starved_s)
            watched.starved_s = now_starved_s
            record = self._read(slot.spec)
            if record is not None:
                self._records[identity] = record

    def waits_for(self, identity: Identity, rank: int) -> bool:
        """Whether a worker waits for a rank, or for a whole group, by its own record."""
        record = self._records.get(identity)
        return record is not None and any(o.peer in (rank, -1) for o in record.waited_for)

    def is_still(self, spec: WorkerSpec, seconds: float) -> bool:
        """Whether a worker's interpreter has not run for longer than `seconds`."""
        watched, beat_s = self._watched.get(spec.identity), liveness_s(spec.liveness)
        return watched is not None and beat_s is not None and watched.fair.since(beat_s) > seconds

    def causes(
        self, slots: Iterable[WorkerSlot], now_s: float, *, draining: bool
    ) -> dict[int, str]:
        """The running workers to kill: rank -> reason.

        Args:
            draining: whether the node leaves the run, and the others will go on without it.
        """
        suspicions = {found.rank: found for found in self._judge.suspicions(now_s)}
        found: dict[int, str] = {}
        for slot in slots:
            watched = self._watched.get(slot.spec.identity)
            if slot.descriptor < 0 or watched is None:
                continue
            cause = self._silence(slot, watched, now_s)
            suspicion = suspicions.get(slot.spec.rank)
            is_inside = slot.is_member and slot.is_inside
            # One that agrees is not at fault if others wait for it: they ought to leave their step,
            # too. It gives up by itself.
            if cause is None and is_inside and suspicion is not None:
                cause = self._verdict(slot, watched, suspicion, now_s)
            if cause is None and is_inside and not slot.finished:
                cause = self._at_work(slot, watched, now_s)
            if cause is None and is_inside and not slot.finished:
                cause = self._overdue(slot, watched)
            left_out = slot.left_out_s is not None and now_s - slot.left_out_s > LEFT_OUT_S
            if cause is None and left_out and not draining:
                cause = "the others went on without it, and it has not ended"
            if cause is not None:
                found[slot.spec.rank] = cause
        return found

    def _silence(self, slot: WorkerSlot, watched: _Watched, now_s: float) -> str | None:
        """The reason if a worker's interpreter has not run for too long."""
        hung_s = self._limits.hang_timeout_s
        record = self._records.get(slot.spec.identity)
        if record is not None and record.busy is not None and now_s <= record.busy_until_s:
            hung_s = float("inf")  # it may load a module or build, with the interpreter's lock held
        beat_s = liveness_s(slot.spec.liveness)
        return silence(slot.pid, beat_s, watched.fair, stopped_s=self._stopped_s, hung_s=hung_s)

    def _at_work(self, slot: WorkerSlot, watched: _Watched, now_s: float) -> str | None:
        """The reason if a worker has no excuse to be still in a step that others have left."""
        since_s, why = self._disturbed.get(slot.spec.identity, (now_s, ""))
        record = self._records.get(slot.spec.identity) or _nothing_yet(slot)
        waited_s = watched.fair.since(since_s)
        if is_excused(record, waited_s - LEAVING_S, now_s, watched.fair.since, self._limits):
            return None
        doing = f"it said that it would {record.busy}" if record.busy else "it computes"
        return f"hung: it has not left its step for {waited_s:.1f} s ({doing}), as {why}"

    def _overdue(self, slot: WorkerSlot, watched: _Watched) -> str | None:
        """The reason if a worker has been busy for longer than it said, waited for or not."""
        record = self._records.get(slot.spec.identity)
        if record is None or record.busy is None:
            return None
        late_s = overdue_s(record, watched.fair.since, self._limits)
        if not late_s:
            return None
        return f"hung: it said that it would {record.busy}, and has done so {late_s:.1f} s too long"

    def _verdict(
        self, slot: WorkerSlot, watched: _Watched, suspicion: Suspicion, now_s: float
    ) -> str | None:
        """The reason if a worker that others wait for has no excuse in its own record."""
        since = watched.fair.since
        record = self._records.get(slot.spec.identity) or _nothing_yet(slot)
        waited_s = since(now_s - suspicion.waited_s)
        if is_excused(record, waited_s, now_s, since, self._limits):
            return None
        if not suspicion.in_circle and record.waited_for:
            return None  # its own wait is news soon, if it lasts
        if record.busy is None:
            return suspicion.reason
        return f"{suspicion.reason}; it said that it would {record.busy} until then at most"

    def new_waits(self, slots: Iterable[WorkerSlot], generation: int) -> list[MembershipEvent]:
        """The events of members that have begun or ended to wait too long."""
        events = []
        for slot in slots:
            identity = slot.spec.identity
            watched, own = self._watched.get(identity), self._records.get(identity)
            if not slot.is_member or watched is None or own is None:
                continue
            others = [record for i, record in self._records.items() if i != identity]
            wait = wait_of(own, others, watched.fair.since, self._limits)
            peers = wait.peers if wait is not None else frozenset()
            if peers != watched.told:
                watched.told = peers
                events.append(self._event(identity, wait, generation))
        return events

    def _event(self, identity: Identity, wait: Wait | None, generation: int) -> MembershipEvent:
        if wait is None:
            return MembershipEvent("waiting", identity, "goes on", 0.0, self._node, generation)
        return MembershipEvent(
            "waiting",
            identity,
            f"has waited {wait.seconds:.1f} s for rank {', '.join(map(str, sorted(wait.peers)))} "
            f"({wait.operation})",
            wait.seconds,
            self._node,
            generation,
            format_identities(Identity(rank) for rank in wait.peers),
        )
