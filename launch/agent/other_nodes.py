"""What an agent tells other nodes of a run, and hears of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from holdfast.elastic import (
    BulletinFollower,
    HeartbeatWatch,
    MembershipEvent,
    MembershipSettings,
    WorkerSpec,
    parse_identities,
    report_on_behalf_of,
)

_WATCHERS = 3
"""Agents that watch heartbeats for all: those of the first nodes of a generation."""
_BULLETINS = 2
"""Generations whose bulletins are followed: others may still be in the one before."""


class OtherNodes:
    """The other nodes of a run, as one agent reaches them. Used by the agent's main thread."""

    def __init__(
        self,
        membership: MembershipSettings,
        node: str,
        *,
        on_event: Callable[[MembershipEvent], None],
        on_silence: Callable[[MembershipEvent], None],
    ) -> None:
        """Start to watch the heartbeats at the Lighthouse.

        Args:
            node: the own one.
            on_event: called in other threads with each event that a node posts, the own included.
            on_silence: called in another thread with what the watch of heartbeats finds.
        """
        self.generation = 0
        """The newest that a worker of this node has told of; 0 before the first."""
        self._membership, self._node, self._on_event = membership, node, on_event
        self._bulletins: list[BulletinFollower] = []
        self._proxies: list[threading.Thread] = []
        self._stop = threading.Event()
        self._watch = HeartbeatWatch(membership, on_silence)

    def enter(self, message: Mapping[str, Any]) -> None:
        """Meet the other agents in the generation that a worker has told of."""
        self.generation = message["number"]
        self._bulletins.append(
            BulletinFollower(message["store"], message["prefix"], self._on_event)
        )
        while len(self._bulletins) > _BULLETINS:
            self._bulletins.pop(0).close()
        watching = self._node in message["nodes"][:_WATCHERS]
        members = parse_identities(message["members"]) if watching else frozenset()
        self._watch.watch(self.generation, members)

    def post(self, event: MembershipEvent) -> None:
        """Tell all other nodes of an event."""
        for bulletin in self._bulletins:
            bulletin.post(event)

    def report_on_behalf_of(self, spec: WorkerSpec, cause: str) -> None:
        """Report for an ended worker, in a thread, until the other nodes go on without it."""
        thread = threading.Thread(
            target=report_on_behalf_of,
            args=(spec.identity, self._membership, spec.acceptor, self._stop),
            kwargs={"data": {"cause": cause}},
            name=f"holdfast-proxy-{spec.identity}",
            daemon=True,
        )
        self._proxies = [proxy for proxy in self._proxies if proxy.is_alive()]
        self._proxies.append(thread)
        thread.start()

    def close(self, *, over: bool) -> None:
        """End all threads.

        Args:
            over: the run has ended; otherwise the others are first given the time to go on without
                the workers of this node, if they are there.
        """
        deadline_s = time.monotonic() + 2 * self._membership.heartbeat_timeout_ms / 1000
        for thread in () if over else self._proxies:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._stop.set()
        for bulletin in self._bulletins:
            bulletin.close()
        self._watch.close()
