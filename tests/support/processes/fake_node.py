"""A node's workers and the other nodes as a script, and a clock that moves by each wait."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from holdfast.elastic.channel import send_message
from holdfast.elastic.generation import Identity, format_identities, parse_identities
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.elastic.quorum_client import MembershipSettings
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.launch.agent import agent
from holdfast.launch.agent.fork_server import Ended, Started
from holdfast.launch.agent.settings import AgentSettings
from support.processes.fake_clock import FakeClock

NO_PROCESS = 1 << 23
"""Above every process id of this machine."""
SETTINGS = MembershipSettings("127.0.0.1:1", "run", 2, 1, 100, 600)


class FakeStore:
    """A store that is hosted."""


@dataclass
class FakeOthers:
    """The other nodes: they hear what is posted, and are met in generations."""

    generation: int = 0
    ranks: frozenset[int] = frozenset()
    """The ranks of the newest generation."""
    over: bool | None = None
    """Whether the agent ended without time for the others."""
    posted: list[MembershipEvent] = field(default_factory=list)
    store_at_close: FakeStore | None = None
    """This node's store, if it is still hosted while the others are given time to go on."""
    cut: list[MembershipEvent] = field(default_factory=list)
    """The losses that this node concludes from being cut off."""
    hosted: list[FakeStore] = field(default_factory=list)

    def enter(self, message: dict[str, Any]) -> None:
        self.generation = message["number"]
        self.ranks = frozenset(i.rank for i in parse_identities(message["members"]))

    def post(self, event: MembershipEvent) -> None:
        self.posted.append(event)

    def report_on_behalf_of(self, spec: WorkerSpec, cause: str, evidence: str = "") -> None:
        pass

    def lost_to_a_cut(self, waited_for: Collection[int], now_s: float) -> list[MembershipEvent]:
        return [event for event in self.cut if event.identity.rank in waited_for]

    def are_known_to_train(self, own: Collection[int]) -> bool | None:
        return bool(self.ranks - set(own)) if self.generation else None

    def close(self, *, over: bool) -> None:
        self.over = over
        self.store_at_close = next(iter(self.hosted), None)

    @contextlib.contextmanager
    def hosted_services(self, settings: AgentSettings, *_: object) -> Iterator[Any]:
        store = FakeStore()
        self.hosted.append(store)
        yield SimpleNamespace(membership=settings.membership, store="127.0.0.1:1")
        self.hosted.remove(store)


@dataclass
class FakeNode:
    """What one agent meets. It is the agent's fork server and its selector."""

    folder: Path
    on_start: Callable[[WorkerSpec], None] = lambda spec: None
    """Called when a worker has been started."""
    on_wait: Callable[[], None] = lambda: None
    """Called in each wait of the agent: what the test has happen meanwhile."""
    clock: FakeClock = field(default_factory=FakeClock)
    others: FakeOthers = field(default_factory=FakeOthers)
    started: list[tuple[float, Identity]] = field(default_factory=list)
    """When each worker was started."""
    killed: list[tuple[float, int]] = field(default_factory=list)
    """When, and the worker of which rank."""
    _reports: deque[Started | Ended] = field(default_factory=deque)
    _ranks: dict[int, int] = field(default_factory=dict)
    """By descriptor."""
    _channels: dict[int, socket.socket] = field(default_factory=dict)
    """The ends of the workers, by rank."""
    _registered: dict[Any, Callable[[Any], None]] = field(default_factory=dict)

    # What workers do.

    @property
    def living(self) -> set[int]:
        """The ranks that have a worker."""
        return set(self._channels)

    def end(self, rank: int, code: int) -> None:
        """The worker of a rank ends."""
        self._channels.pop(rank).close()
        self._reports.append(Ended(rank, NO_PROCESS + rank, code))

    def finish(self, rank: int, code: int = 0) -> None:
        """The worker of a rank says that all is done, and ends."""
        send_message(self._channels[rank], {"kind": "finished"})
        self.end(rank, code)

    def say(self, rank: int, line: str) -> None:
        """The worker of a rank has a line for the user."""
        send_message(self._channels[rank], {"kind": "line", "text": line})

    def tell_generation(self, rank: int, number: int, members: tuple[Identity, ...]) -> None:
        """The worker of a rank tells of a generation."""
        place = {"store": "127.0.0.1:1", "prefix": "", "nodes": []}
        message = {"number": number, "members": format_identities(members), **place}
        send_message(self._channels[rank], {"kind": "generation", **message})

    def tell(self, rank: int, kind: str, **fields: Any) -> None:
        """The worker of a rank sends its agent a message."""
        send_message(self._channels[rank], {"kind": kind, **fields})

    # The fork server.

    def start(self, spec: WorkerSpec, log: Path) -> socket.socket:
        ours, self._channels[spec.rank] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptor = os.open(os.devnull, os.O_RDONLY)  # which the agent closes
        self._ranks[descriptor] = spec.rank
        self.started.append((self.clock(), spec.identity))
        self._reports.append(Started(spec.rank, NO_PROCESS + spec.rank, descriptor))
        self.on_start(spec)
        return ours

    def receive(self) -> Started | Ended:
        return self._reports.popleft()

    def look(self) -> None:
        """The fork server always runs."""

    def rest(self) -> None:
        pass

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _signal(self, descriptor: int, number: int) -> None:
        rank = self._ranks[descriptor]
        if number == signal.SIGKILL and rank in self._channels:
            self.killed.append((self.clock(), rank))
            self.end(rank, -number)

    # The selector.

    def register(self, what: Any, events: int, data: Callable[[Any], None]) -> None:
        self._registered[what] = data

    def unregister(self, what: Any) -> None:
        del self._registered[what]

    def select(self, timeout_s: float) -> list[tuple[Any, int]]:
        ready = self._ready()
        if not ready:
            self.clock.now_s += timeout_s
            self.on_wait()
            ready = self._ready()
        return [(SimpleNamespace(data=self._registered[what], fileobj=what), 1) for what in ready]

    def _ready(self) -> list[Any]:
        channels = [what for what in self._registered if isinstance(what, socket.socket)]
        told = select.select(channels, [], [], 0)[0]
        return told or ([self] if self._reports else [])

    def __hash__(self) -> int:
        return id(self)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        with (
            mock.patch.multiple(
                agent,
                ForkServer=lambda main, **_: self,
                OtherNodes=lambda *_, **__: self.others,
                hosted_services=self.others.hosted_services,
                coordination=lambda: None,
            ),
            mock.patch.object(agent.selectors, "DefaultSelector", return_value=self),
            mock.patch.object(signal, "pidfd_send_signal", self._signal),
        ):
            yield

    def run(self, **settings: Any) -> int:
        """Run an agent of this node to its end; its exit code. It has rank 0 unless told."""
        base = AgentSettings(
            membership=SETTINGS,
            ranks=(0,),
            node="here",
            log=lambda rank: self.folder / f"{rank}.log",
            folder=self.folder,
        )
        with self._in_place():
            found = agent.Agent(replace(base, **settings), lambda *_: 0, clock=self.clock)
            return found.run()
