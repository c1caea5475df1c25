"""The specification of a worker: what its agent hands to the process that it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from holdfast.elastic.agreement import AcceptorFile
from holdfast.elastic.generation import Identity
from holdfast.elastic.quorum_client import MembershipSettings


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker of a run, as its agent starts it."""

    rank: int
    incarnation: int
    local_rank: int
    """The worker's number among the workers of its node."""
    node: str
    """Its agent's name, which no other agent of the run has."""
    store: str
    """HOST:PORT of the rendezvous store in its agent."""
    founder: bool
    """Whether it founds the run: it is a first worker, or replaces one that had not reported."""
    folder: str
    """The folder of its acceptor state and liveness timestamp: on its node, seen by its agent."""
    settings: MembershipSettings
    machine: str = ""
    """The identity of the machine on which it runs."""

    @property
    def identity(self) -> Identity:
        return Identity(self.rank, self.incarnation)

    @property
    def acceptor(self) -> AcceptorFile:
        return AcceptorFile(Path(self.folder), self.identity)

    @property
    def liveness(self) -> Path:
        """The file in which the worker's channel writes when it last ran Python."""
        return Path(self.folder) / f"{self.identity}.liveness"

    @property
    def flight_record(self) -> Path:
        """The worker's flight record. Its agent reads it for waits that last too long."""
        return Path(self.folder) / f"{self.identity}.page"

    @property
    def stacks(self) -> Path:
        """The file in which the worker's stacks appear on a signal; until it is there, the signal
        would end the worker."""
        return Path(self.folder) / f"{self.identity}.stacks"

    @property
    def testimony(self) -> Path:
        """What the worker itself knows of its state, as its agent has asked for it."""
        return Path(self.folder) / f"{self.identity}.testimony"

    @property
    def failure(self) -> Path:
        """The evidence of the error that has ended the worker."""
        return Path(self.folder) / f"{self.identity}.failure"
