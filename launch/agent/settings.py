"""The settings of an agent: its node, its ranks, and its patience."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.elastic import HangLimits, MembershipSettings, Roll, RunEnd, WorkerSpec
from holdfast.launch.agent.liveness import record_of
from holdfast.launch.agent.restarts import RestartPolicy
from holdfast.launch.machine_errors import MachineError, MachineRoots
from holdfast.parallel.comm import FlightRecord
from holdfast.parallel.errors import Stopped

logger = logging.getLogger("holdfast.agent")


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
    """The name of this agent, which no other agent of the run has."""
    log: Callable[[int], Path]
    """Returns the file for the output of a rank."""
    machine: str = ""
    """The identity of the machine: nodes on one machine share its memory, and are lost with it."""
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
    apart_s: float = 150.0
    """Seconds without a part in the run after which the node ends; see `Standing`."""
    roll: Path | None = None
    """The folder in which all agents of the run read how it ended; None: there is none."""
    is_over: Callable[[], bool] | None = None
    """Tells a joining node that has no part in the run whether the run has ended."""
    failure: Callable[[int, int], str | None] | None = None
    """Returns why the worker of a rank ended with an exit code, if that is written, and if another
    worker would fail in the same way; None: not known."""
    may_start: Callable[[WorkerSpec], bool] | None = None
    """Holds a worker back until it returns True."""
    incarnation: int = 0
    """The incarnation of this node's first workers; for a joining node, higher than any that its
    ranks have had."""
    read_record: Callable[[WorkerSpec], FlightRecord | None] = record_of
    """Reads a worker's flight record, if there is one."""
    roots: MachineRoots | None = None
    """Where the kernel tells of errors of this machine; None: no error is looked for, as another
    agent of this machine does it."""
    on_machine_errors: Callable[[Sequence[MachineError]], None] | None = None
    """Called in another thread with new errors of this machine."""
    on_stranger: Callable[[str], None] | None = None
    """Called once, in another thread, with a sentence about the first connection of a stranger."""
    incidents: Path | None = None
    """The folder of the run's incidents as this node sees it, for evidence; None: none is kept."""
    folder: Path | None = None
    """The folder of acceptor states and liveness timestamps on this node; None: a temporary one."""

    def ended(self) -> RunEnd | None:
        """How the run has ended, if that can be known here."""
        found = Roll(self.roll).ended() if self.roll is not None else None
        if found is None and self.is_over is not None and self.is_over():
            return RunEnd(Stopped.exit_code, "the run is no longer under way")
        return found

    def note_end(self, end: RunEnd) -> None:
        """Write how the run has ended where all agents of the run read it."""
        if self.roll is not None:
            Roll(self.roll).end(end)

    @contextlib.contextmanager
    def signed(self, address: str) -> Iterator[None]:
        """Keep the agent in the roll during the block, so that the others can know its end.

        Args:
            address: the address of its rendezvous store.
        Raises:
            Stopped: a joining node cannot enter itself, and would not be known to the others.
        """
        with contextlib.ExitStack() as held:
            if self.roll is not None:
                try:
                    held.enter_context(Roll(self.roll).sign(address))
                except OSError as error:
                    if not self.founder:
                        raise Stopped(
                            f"this node cannot join: {error}; free {self.roll}"
                        ) from error
                    logger.warning("the others cannot know of this agent's end: %s", error)
            yield

    def specs(
        self, membership: MembershipSettings, store: str, folder: Path
    ) -> Iterator[WorkerSpec]:
        """The specifications of the first workers of this node.

        Args:
            membership: the membership settings with the Lighthouse's URL.
            store: the address of the agent's rendezvous store.
        """
        for local_rank, rank in enumerate(self.ranks, self.first_local_rank):
            yield WorkerSpec(
                rank=rank,
                incarnation=self.incarnation,
                local_rank=local_rank,
                node=self.node,
                machine=self.machine,
                store=store,
                founder=self.founder,
                folder=str(folder),
                settings=membership,
            )
