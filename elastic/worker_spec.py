"""The specification of a worker: what its agent hands to the process that it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from holdfast.elastic.acceptor_state import AcceptorFile
from holdfast.elastic.generation import Identity
from holdfast.elastic.quorum_client import MembershipSettings


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker of a run, as its agent starts it."""

    rank: int
    incarnation: int
    local_rank: int
    """Among the workers of its node."""
    node: str
    """The failure domain that it runs in."""
    store: str
    """HOST:PORT of the store in its agent."""
    founder: bool
    """The run is started with it, or it replaces a founder that had not voted."""
    folder: str
    """Where its acceptor state and its liveness timestamp lie; on its node, seen by its agent."""
    settings: MembershipSettings

    @property
    def identity(self) -> Identity:
        return Identity(self.rank, self.incarnation)

    @property
    def acceptor(self) -> AcceptorFile:
        return AcceptorFile(Path(self.folder), self.identity)

    @property
    def liveness(self) -> Path:
        """Written by the worker's channel: when it last ran Python."""
        return Path(self.folder) / f"{self.identity}.liveness"

    @property
    def flight_record(self) -> Path:
        """The worker's flight record, which its agent reads for waits that last too long."""
        return Path(self.folder) / f"{self.identity}.page"


def worker_spec_to_data(spec: WorkerSpec) -> dict[str, Any]:
    """A worker spec as JSON values."""
    return msgspec.to_builtins(spec)


def worker_spec_from_data(plain: dict[str, Any]) -> WorkerSpec:
    """The worker spec that `worker_spec_to_data` wrote."""
    return msgspec.convert(plain, WorkerSpec)
