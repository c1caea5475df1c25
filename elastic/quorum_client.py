"""A client of the Lighthouse's rounds: it reports as one worker, or on behalf of an ended one."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.elastic.acceptor_state import AcceptorFile
from holdfast.elastic.agreement import (
    AcceptorState,
    PassedOver,
    Report,
    Verdict,
    advance,
    aware,
    misses_answer,
    needs_another,
    report_from_data,
    report_to_data,
)
from holdfast.elastic.generation import Generation, Identity
from holdfast.elastic.lighthouse import (
    LighthouseAway,
    RoundClient,
    RoundTimeout,
    identity_of,
    lighthouse_key,
    reached_by,
    replica_id,
)
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.errors import MembershipError
from holdfast.parallel.links import Tunnels, derived_key, new_secret

logger = logging.getLogger("holdfast.membership")

PAUSE_S = 0.02
"""The pause between rounds that decide nothing; a round itself waits for missing workers."""
_PAUSE_UNREACHABLE_S = 0.1
_TELL_S = 0.2
"""The pause between rounds of a settled worker, and before the first: mostly none is needed."""


_LATE_SHARE = 0.8
"""The part of the limit of an agreement in which members may stay at work."""


@dataclass(frozen=True, slots=True)
class MembershipSettings:
    """The settings that all workers of a run have in common."""

    lighthouse: str
    """The URL: http://HOST:PORT, or holdfast://HOST:PORT for one behind a door."""
    run: str
    """The run's name, which separates runs at one Lighthouse: letters, digits, dots, dashes."""
    world_size: int
    """The number of ranks that the run is started with."""
    min_ranks: int = 1
    heartbeat_ms: int = 100
    heartbeat_timeout_ms: int = 3000
    agree_s: float = 60.0
    """Seconds after which a worker gives up to agree with others."""
    hang_timeout_s: float = 10.0
    """Seconds after which an agent ends a worker of its own that hangs."""
    roll: str = ""
    """The folder of the roll of agents (`Roll`), which all nodes see; empty: there is none."""
    secret: str = field(default_factory=new_secret, repr=False)
    """The run's secret: the processes that hold it may take part."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.run):
            raise MembershipError(
                f"{self.run!r} cannot name a run at a Lighthouse; use letters, digits, dots and "
                "dashes"
            )

    @property
    def lighthouse_key(self) -> bytes:
        """The key to the door of the Lighthouse."""
        return lighthouse_key(self.secret)

    @property
    def report_key(self) -> bytes:
        """The key of the proofs that reports at the Lighthouse carry."""
        return derived_key(self.secret, f"report of {self.run}")

    @property
    def store_key(self) -> bytes:
        """The key to the doors of this run's stores."""
        return derived_key(self.secret, f"store of {self.run}")

    def through(self, tunnels: Tunnels) -> MembershipSettings:
        """The same, with the Lighthouse as this process and those that it trusts reach it."""
        return replace(self, lighthouse=reached_by(self.lighthouse, tunnels, self.lighthouse_key))

    @property
    def silence_s(self) -> float:
        """Seconds of silence after which a worker counts as lost."""
        return self.heartbeat_timeout_ms / 1000

    @property
    def patience_s(self) -> float:
        """How long members are waited for of which nothing is heard, in seconds.

        Mostly an agent notices sooner what is wrong with them, and tells it.
        """
        return self.hang_timeout_s + 2 * self.silence_s + 1.0

    @property
    def call_s(self) -> float:
        """How long one call waits for a round, in seconds; the report is sent again afterwards."""
        return min(0.5, self.silence_s)


class QuorumClient:
    """Reports as one worker. The caller must hold the worker's acceptor file."""

    def __init__(
        self, identity: Identity, settings: MembershipSettings, acceptor_file: AcceptorFile
    ) -> None:
        self.identity = identity
        self.acceptor = acceptor_file.read()
        self.settings = settings
        self._acceptor_file = acceptor_file
        self._client = RoundClient(settings.lighthouse)
        self._replica = replica_id(settings.run, identity)
        self._said = ""
        self._strangers = set[str]()

    def round(self, report: Report, timeout_s: float) -> tuple[Verdict, Mapping[Identity, Report]]:
        """Take part in one round with `report` and the present acceptor state.

        Returns:
            The verdict, already written to the acceptor file, and all reports by identity.
        Raises:
            Superseded: the run has gone on without this worker.
            LighthouseAway, RoundTimeout: see `RoundClient.round`.
        """
        own = replace(report, identity=self.identity, acceptor=self.acceptor)
        reports = self.exchange(own, timeout_s)
        verdict = advance(own, reports)
        if verdict.acceptor != self.acceptor:
            self._acceptor_file.write(verdict.acceptor)
            self.acceptor = verdict.acceptor
        if verdict.outcome == "wait":
            self.say(verdict.reason)
        return verdict, reports

    def exchange(self, own: Report, timeout_s: float) -> Mapping[Identity, Report]:
        """Take part in one round, and conclude nothing from it. Returns all reports by identity.

        From any thread.

        Raises:
            LighthouseAway, RoundTimeout: see `RoundClient.round`.
        """
        sealed = sealed_report(own, self._replica, self.settings.report_key)
        answer = self._client.round(self._replica, sealed, timeout_s)
        reports = dict[Identity, Report]()
        for replica, data in answer:
            identity = identity_of(replica, self.settings.run)
            if identity is not None:
                found = opened_report(data, replica, self.settings.report_key)
                if found is not None:
                    reports[identity] = found
                elif replica not in self._strangers:
                    self._strangers.add(replica)
                    logger.warning("a report as %s is ignored: it has no proof", replica)
        return reports

    def say(self, reason: str) -> None:
        """Log why there is no agreement yet, once per reason."""
        if reason != self._said:
            logger.info("rank %s: %s", self.identity, reason)
            self._said = reason


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
        identity: MembershipEvent("ended", identity, cause)
        for identity, report in reports.items()
        if not report.alive and isinstance(cause := report.data.get("cause"), str)
    }


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


class Attendance:
    """When an agreement has last heard of each member; it does not wait for those it misses."""

    def __init__(self, patience_s: float, limit_s: float, clock: Callable[[], float]) -> None:
        """Begin the agreement.

        Args:
            patience_s: how long a member may be missing from rounds.
            limit_s: the limit of the agreement, which comes to an end before it: members that are
                still at work then are left out, so that not all give up.
        """
        self._patience_s, self._clock = patience_s, clock
        self._late_s = _LATE_SHARE * limit_s
        self._since_s = clock()
        self._seen_s: dict[Identity, float] = {}
        self._agree: frozenset[Identity] = frozenset()

    def note(self, reports: Mapping[Identity, Report]) -> None:
        """Note the workers of a round: those that agree, and those that only say that they work."""
        self._seen_s.update(dict.fromkeys(reports, self._clock()))
        self._agree = frozenset(i for i, report in reports.items() if not report.settled)

    def begin_again(self) -> None:
        """Miss no member yet, as after a time in which this worker was cut off."""
        self._since_s = self._clock()
        self._seen_s.clear()

    def overdue(self, members: frozenset[Identity]) -> frozenset[Identity]:
        """The members that have been missing for too long."""
        now_s = self._clock()
        if now_s - self._since_s > self._late_s:
            return members - self._agree
        return frozenset(
            identity
            for identity in members
            if now_s - self._seen_s.get(identity, self._since_s) > self._patience_s
        )


def sealed_report(report: Report, replica: str, key: bytes) -> dict[str, Any]:
    """The report as JSON values, with a proof that a holder of the key made it for this replica."""
    text = json.dumps(report_to_data(report))
    return {"report": text, "proof": _proof(text, replica, key)}


def opened_report(data: Mapping[str, Any], replica: str, key: bytes) -> Report | None:
    """The report in `sealed_report`'s values; None: its proof is wrong or missing.

    Raises:
        MembershipError: the report is of another version of holdfast.
    """
    text, proof = data.get("report"), data.get("proof")
    if not isinstance(text, str) or not isinstance(proof, str):
        return None
    if not hmac.compare_digest(_proof(text, replica, key).encode(), proof.encode()):
        return None
    return report_from_data(json.loads(text))


def _proof(text: str, replica: str, key: bytes) -> str:
    return hmac.digest(key, f"{replica} {text}".encode(), "sha256").hex()


def report_on_behalf_of(
    identity: Identity,
    settings: MembershipSettings,
    acceptor_file: AcceptorFile,
    stop: threading.Event,
    *,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Report for a worker whose process has ended, until all know of a generation without it.

    Blocks; run it in a thread. It keeps what the worker has accepted, so the rule of agreement
    holds. It also completes rounds, so no worker waits for the dead one's heartbeats to grow old.
    The answer of the round that chose the generation may be lost on the way to some; if these are
    no majority of the last one, they depend on the acceptances of the dead to learn of it.

    Args:
        stop: ends the reports at the next round.
        data: values for the members, sent with the report, such as why the process ended.
    """
    with acceptor_file.held(wait=True):
        client = QuorumClient(identity, settings, acceptor_file)
        report = Report(
            identity,
            alive=False,
            world_size=settings.world_size,
            min_ranks=settings.min_ranks,
            data=data or {},
        )
        chosen: AcceptorState | None = None
        while chosen is None and not stop.is_set():
            try:
                verdict, _ = client.round(report, settings.call_s)
            except PassedOver as over:
                chosen = over.chosen
                continue
            except MembershipError:
                stop.wait(_PAUSE_UNREACHABLE_S)
                continue
            if verdict.acceptor.generation and identity not in verdict.acceptor.members:
                return
            if verdict.outcome == "wait":
                stop.wait(PAUSE_S)
        if chosen is not None:
            _await_all(client, replace(report, acceptor=client.acceptor), chosen, stop)


def _await_all(
    client: QuorumClient, report: Report, chosen: AcceptorState, stop: threading.Event
) -> None:
    """Repeat a report until all members of a chosen generation know of it, or have given up."""
    settings = client.settings
    end_s = time.monotonic() + settings.agree_s
    know: frozenset[Identity] = frozenset()
    while not (know >= chosen.members or stop.wait(PAUSE_S) or time.monotonic() > end_s):
        with contextlib.suppress(LighthouseAway, RoundTimeout):
            know |= aware(chosen, client.exchange(report, settings.call_s))
