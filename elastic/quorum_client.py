"""A client of the Lighthouse's rounds, which reports as one worker."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from holdfast.elastic.agreement import (
    AcceptorFile,
    Report,
    Verdict,
    advance,
    opened_report,
    sealed_report,
)
from holdfast.elastic.generation import Identity
from holdfast.elastic.lighthouse import (
    RoundClient,
    identity_of,
    lighthouse_key,
    reached_by,
    replica_id,
)
from holdfast.parallel.errors import MembershipError
from holdfast.parallel.links import Tunnels, derived_key, new_secret

logger = logging.getLogger("holdfast.membership")

PAUSE_S = 0.02
"""The pause between rounds that decide nothing; a round itself waits for missing workers."""


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
