"""The membership events that one worker has heard of, and their meaning for its generation."""

from __future__ import annotations

import threading
from collections.abc import Callable

from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.membership_events import MembershipEvent


class EventLog:
    """Keeps events until they are outdated, and reports urgent ones. Shared between threads."""

    def __init__(self, identity: Identity) -> None:
        """Nothing has been heard yet.

        Args:
            identity: the identity of the worker that keeps the log.
        """
        self._identity = identity
        self._lock = threading.Lock()
        self._reporting = threading.Lock()
        """Held while a new event is reported, before `_lock`: an agreement begins after it."""
        self._call: Callable[[MembershipEvent], None] | None = None
        self._events: list[MembershipEvent] = []
        self._lost: set[Identity] = set()
        self._agreeing = False
        self._generation: Generation | None = None

    def hear(self, event: MembershipEvent) -> None:
        """Add an event; report it at once if a member is lost and no agreement is under way."""
        with self._reporting:
            with self._lock:
                if event in self._events:
                    return
                if event.lost:
                    self._lost.add(event.identity)
                    self._events = [
                        e
                        for e in self._events
                        if e.kind != "joining" or e.identity != event.identity
                    ]
                self._events.append(event)
                news = event.urgent and self._concerns(event) and not self._agreeing
                call = self._call if news else None
            if call is not None:
                call(event)

    def on_urgent(self, call: Callable[[MembershipEvent], None] | None) -> None:
        """Set the function that gets each urgent event, in another thread; known ones come now."""
        with self._lock:
            self._call = call
            missed = [e for e in self._events if e.urgent and self._concerns(e)]
        if call is not None:
            for event in missed:
                call(event)

    @property
    def wanted(self) -> tuple[MembershipEvent, ...]:
        """The joining and leaving workers, which wait for the end of a step."""
        with self._lock:
            return tuple(
                e for e in self._events if e.kind in ("joining", "leaving") and self._concerns(e)
            )

    @property
    def lost(self) -> frozenset[Identity]:
        """The workers that an agreement does not wait for."""
        with self._lock:
            return frozenset(self._lost)

    @property
    def disturbed(self) -> bool:
        """Whether an urgent event is known, so that this worker must leave its generation."""
        with self._lock:
            return any(e.urgent and self._concerns(e) for e in self._events)

    def forget_silence(self) -> None:
        """Wait again for workers that were only silent."""
        with self._lock:
            self._lost = {e.identity for e in self._events if e.kind == "ended"}

    def drain(self) -> tuple[MembershipEvent, ...]:
        """All events since the last call, for the records; outdated ones are removed."""
        with self._lock:
            events = tuple(self._events)
            self._events = [e for e in self._events if self._concerns(e)]
        return events

    def begin_agreement(self) -> None:
        """Report no event until `end_agreement`; waits for a report that is under way."""
        with self._reporting, self._lock:
            self._agreeing = True

    def end_agreement(self, generation: Generation | None) -> None:
        """Remove the events that a new generation has outdated, and report losses since then.

        Args:
            generation: the generation agreed on; None if the agreement failed and the last one
                stays.
        """
        with self._lock:
            self._agreeing = False
            self._generation = generation or self._generation
            if self._generation is not None:
                # A worker that is still silent is noticed again; one that wants to join asks again.
                outdated = ("silent", "joining")
                self._events = [
                    e for e in self._events if e.kind not in outdated or not self._concerns(e)
                ]
            self._lost = {e.identity for e in self._events if e.lost}
            call = self._call
        self.on_urgent(call)

    def _concerns(self, event: MembershipEvent) -> bool:
        """Whether an event is news to the present generation."""
        if self._generation is None:
            return False
        if event.generation and event.generation != self._generation.number:
            return False
        inside = event.identity in self._generation.identities
        if event.kind == "disturbed":
            return inside and event.identity != self._identity
        if event.kind == "leaving":
            return inside and not any(
                m.leaving for m in self._generation.members if m.identity == event.identity
            )
        return inside != (event.kind == "joining")
