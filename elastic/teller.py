"""A worker that is at work in a generation, and tells of it those that missed the answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from holdfast.elastic.agreement import AcceptorState, Report, misses_answer, needs_another
from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.elastic.quorum_client import PAUSE_S, QuorumClient
from holdfast.parallel.errors import MembershipError

_TELL_S = 0.2
"""The pause between rounds of a settled worker, and before the first: mostly none is needed."""


class Teller:
    """Tells in rounds, in a thread, that this worker is in a generation, while it trains there.

    It does so twice: until all members are known to be in it, since the answer of the round that
    decided it may have been lost on the way to some; and while others have left it and this worker
    is still at work, which it can leave only between two operations.
    """

    def __init__(
        self, client: QuorumClient, call_s: float, hear: Callable[[MembershipEvent], None]
    ) -> None:
        """Tell of nothing yet.

        Args:
            call_s: how long one call waits for a round, in seconds.
            hear: called in that thread if a member cannot go on in the generation.
        """
        self._client, self._call_s, self._hear = client, call_s, hear
        self._lock = threading.Lock()
        self._generation: Generation | None = None
        """The generation that this worker is in; under the lock, as is the next."""
        self._stop: threading.Event | None = None
        """Ends the thread; None: there is none."""

    def enter(self, generation: Generation) -> None:
        """Tell of a generation that this worker is in now."""
        with self._lock:
            self._generation = generation
        self.tell()

    def tell(self, of: int = 0) -> None:
        """Tell of the generation that this worker is in. From any thread.

        Args:
            of: the number of a generation; if this worker is not in it, it tells nothing. 0: any.
        """
        with self._lock:
            is_in_it = self._generation is not None and of in (0, self._generation.number)
            if not is_in_it or self._stop is not None:
                return
            self._stop = threading.Event()
            threading.Thread(
                target=self._run,
                args=(self._generation, self._stop),
                name="holdfast-teller",
                daemon=True,
            ).start()

    def rest(self) -> None:
        """Begin no more rounds. Does not wait for the one under way, which does no harm."""
        with self._lock:
            if self._stop is not None:
                self._stop.set()
                self._stop = None

    def leave(self) -> None:
        """Tell of nothing until `enter`."""
        with self._lock:
            self._generation = None
        self.rest()

    def _run(self, generation: Generation, stop: threading.Event) -> None:
        acceptor = AcceptorState(generation.number, generation.identities)
        first = Report(self._client.identity, acceptor, held=generation.number, settled=True)
        pause_s, own = _TELL_S, first
        while not stop.wait(pause_s):
            pause_s = _TELL_S
            try:
                reports = self._client.exchange(own, self._call_s)
            except MembershipError:
                continue
            if stop.is_set():
                return
            own, events = told_next(first, generation, reports)
            if own.told is not None:
                pause_s = PAUSE_S
            for event in events:
                self._hear(event)


def ends_of(reports: Mapping[Identity, Report]) -> dict[Identity, MembershipEvent]:
    """The ends of workers whose agents report why they ended; news of them may come later. Pure."""
    return {
        identity: MembershipEvent("ended", identity, cause, evidence=_text(report.data, "evidence"))
        for identity, report in reports.items()
        if not report.alive and isinstance(cause := report.data.get("cause"), str)
    }


def _text(data: Mapping[str, Any], key: str) -> str:
    found = data.get(key)
    return found if isinstance(found, str) else ""


def told_next(
    own: Report, generation: Generation, reports: Mapping[Identity, Report]
) -> tuple[Report, list[MembershipEvent]]:
    """The next report of a settled worker after a round, and what it has learnt of members. Pure.

    The lowest of the settled workers tells the value, and only if one misses it: reports stay
    short.
    """
    missed = any(misses_answer(report, generation) for report in reports.values())
    tells = own.identity == min(
        (i for i, r in reports.items() if r.settled and r.acceptor == own.acceptor), default=None
    )
    ends = ends_of(reports)
    events = [
        ends.get(identity)
        or MembershipEvent(
            "disturbed" if report.alive else "ended",
            identity,
            "takes part in a new round" if report.alive else "ended before it began",
            node=report.node,
            generation=generation.number,
        )
        for identity, report in sorted(reports.items())
        if needs_another(report, generation)
    ]
    return replace(own, told=generation if missed and tells else None), events
