"""The link of an agent to the other nodes of a run: events sent and received."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from holdfast.elastic import (
    BulletinFollower,
    HeartbeatWatch,
    Identity,
    MembershipEvent,
    StoreClients,
    WorkerSpec,
    answers,
    parse_identities,
    report_on_behalf_of,
)
from holdfast.launch.agent.services import Services

_WATCHERS = 3
"""The number of agents that watch heartbeats for all: those of a generation's first nodes."""
_LOOK_S, _CUT_LOOKS = 1.0, 3
_STORE_TIMEOUT_S = 5.0
_BULLETINS = 2
"""The number of generations whose bulletins are followed: others may still be in the last one."""


class OtherNodes:
    """The other nodes of a run, as one agent reaches them. The agent's main thread uses it."""

    def __init__(
        self,
        services: Services,
        node: str,
        *,
        on_event: Callable[[MembershipEvent], None],
        on_silence: Callable[[MembershipEvent], None],
        lives: Callable[[Identity], bool],
    ) -> None:
        """Start to watch the heartbeats at the Lighthouse.

        Args:
            node: this agent's own node.
            on_event: called in other threads with each event that a node posts, also this one.
            on_silence: called in another thread with the events of the heartbeat watch.
            lives: called there; whether a worker of this node runs, as far as this agent sees.
        """
        self.generation = 0
        """The newest generation that a worker of this node has reported; 0 before the first."""
        self._services, self._node, self._on_event = services, node, on_event
        self._members: frozenset[Identity] = frozenset()
        self._look_at_s, self._cut_looks = 0.0, 0
        self._stores = StoreClients(services.access, _STORE_TIMEOUT_S)
        self._bulletins: list[BulletinFollower] = []
        self._proxies: list[threading.Thread] = []
        self._stop = threading.Event()
        self._watch = HeartbeatWatch(services.membership, on_silence, lives=lives)

    def enter(self, message: Mapping[str, Any]) -> None:
        """Meet the other agents in the generation that a worker has reported."""
        self.generation, self._cut_looks = message["number"], 0
        self._members = parse_identities(message["members"])
        self._bulletins.append(
            BulletinFollower(self._stores, message["store"], message["prefix"], self._on_event)
        )
        while len(self._bulletins) > _BULLETINS:
            self._bulletins.pop(0).close()
        watching = self._node in message["nodes"][:_WATCHERS]
        self._watch.watch(self.generation, self._members if watching else frozenset())

    def are_known_to_train(self, own: Collection[int]) -> bool | None:
        """Whether others than these ranks are in the newest generation; None: there is none."""
        if not self.generation:
            return None
        return any(identity.rank not in own for identity in self._members)

    def lost_to_a_cut(self, waited_for: Collection[int], now_s: float) -> list[MembershipEvent]:
        """The losses of other nodes' ranks if this node is cut off; looks once a second.

        It is cut off if it reaches neither the Lighthouse nor the store of its generation, three
        times in a row. Its own store does not count. Waits 0.2 s at most.

        Args:
            waited_for: the ranks that workers of this node have waited for too long.
        """
        if not waited_for or now_s < self._look_at_s:
            return []
        self._look_at_s = now_s + _LOOK_S
        newest = self._bulletins[-1] if self._bulletins else None
        reached = newest is not None and newest.is_open and newest.store != self._services.store
        cut_off = not reached and not answers(self._services.membership.lighthouse)
        self._cut_looks = self._cut_looks + 1 if cut_off else 0
        if self._cut_looks < _CUT_LOOKS:
            return []
        cause = f"node {self._node} reaches neither the Lighthouse nor another node"
        return [
            MembershipEvent("silent", identity, cause, generation=self.generation)
            for identity in self._members
            if identity.rank in waited_for
        ]

    def post(self, event: MembershipEvent) -> None:
        """Post an event to all other nodes."""
        for bulletin in self._bulletins:
            bulletin.post(event)

    def report_on_behalf_of(self, spec: WorkerSpec, cause: str, evidence: str = "") -> None:
        """Report for an ended worker, in a thread, until the other nodes go on without it.

        Args:
            evidence: the name of the file of evidence about it.
        """
        thread = threading.Thread(
            target=report_on_behalf_of,
            args=(spec.identity, self._services.membership, spec.acceptor, self._stop),
            kwargs={"data": {"cause": cause, "evidence": evidence}},
            name=f"holdfast-proxy-{spec.identity}",
            daemon=True,
        )
        self._proxies = [proxy for proxy in self._proxies if proxy.is_alive()]
        self._proxies.append(thread)
        thread.start()

    def close(self, *, over: bool) -> None:
        """End all threads.

        Args:
            over: whether the run has ended; otherwise the others, if there are any, first get the
                time to go on without the workers of this node.
        """
        deadline_s = time.monotonic() + 2 * self._services.membership.silence_s
        for thread in () if over else self._proxies:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._stop.set()
        for bulletin in self._bulletins:
            bulletin.close()
        self._watch.close()
