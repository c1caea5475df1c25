"""What an agent is told: its node, its ranks, and how patient it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.elastic import MembershipSettings, Wait, WorkerSpec
from holdfast.launch.agent.liveness import LivenessCheck
from holdfast.launch.agent.restarts import RestartPolicy


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent does, and for which ranks.

    A flat table, a field for each value: each is given by name, and none is derived.
    """

    membership: MembershipSettings
    """`lighthouse` may be empty: the agent then hosts one."""
    ranks: tuple[int, ...]
    """The ranks of this node."""
    node: str
    """The failure domain, as other nodes are to see it."""
    log: Callable[[int], Path]
    """Where the output of a rank goes."""
    first_local_rank: int = 0
    """Of these among all ranks of this machine: which of its devices they use."""
    host: str = "127.0.0.1"
    """This node's address as other nodes reach it."""
    hang_timeout_s: float = 10.0
    respawn: bool = True
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    exit_s: float = 30.0
    """How long workers may take to leave after SIGTERM, and others to end once one has finished."""
    founder: bool = True
    """False for a node that joins a run which others have begun."""
    is_over: Callable[[], bool] | None = None
    """Tells a node that joins, and has not been taken in yet, that the run has ended."""
    may_start: Callable[[WorkerSpec], bool] | None = None
    """Holds a worker back until it is true."""
    incarnation: int = 0
    """Of this node's first workers; for a node that joins, higher than any that its ranks have
    had."""
    liveness: LivenessCheck | None = None
    """A further check beside that of the liveness timestamp."""
    waits: Callable[[WorkerSpec], Wait | None] | None = None
    """Reads from the flight record of a worker whether it has waited for others for too long."""
    folder: Path | None = None
    """For acceptor states and liveness timestamps, on this node; a temporary one by default."""
