"""The settings of an agent: its node, its ranks, and its patience."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.elastic import HangLimits, MembershipSettings, WorkerSpec
from holdfast.launch.agent.liveness import record_of
from holdfast.launch.agent.restarts import RestartPolicy
from holdfast.parallel.comm import FlightRecord


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The settings of one agent.

    A flat table, a field for each value: each is given by name, and none is derived.
    """

    membership: MembershipSettings
    """The membership settings; with an empty `lighthouse` the agent hosts one."""
    ranks: tuple[int, ...]
    """The ranks of this node."""
    node: str
    """The failure domain that other nodes see."""
    log: Callable[[int], Path]
    """Returns the file for the output of a rank."""
    first_local_rank: int = 0
    """The first of these ranks among all ranks of this machine: decides their devices."""
    host: str = "127.0.0.1"
    """This node's address for other nodes."""
    limits: HangLimits = field(default_factory=HangLimits)
    respawn: bool = True
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    exit_s: float = 30.0
    """Seconds that workers may take to leave after SIGTERM, and others to end once one has
    finished."""
    founder: bool = True
    """False for a node that joins a run under way."""
    is_over: Callable[[], bool] | None = None
    """Tells a joining node that is not admitted yet whether the run has ended."""
    may_start: Callable[[WorkerSpec], bool] | None = None
    """Holds a worker back until it returns True."""
    incarnation: int = 0
    """The incarnation of this node's first workers; for a joining node, higher than any that its
    ranks have had."""
    read_record: Callable[[WorkerSpec], FlightRecord | None] = record_of
    """Reads a worker's flight record, if there is one."""
    folder: Path | None = None
    """The folder of acceptor states and liveness timestamps on this node; None: a temporary one."""
