"""Threads of an agent that follow other nodes: by bulletins, and by heartbeats."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from holdfast.elastic.channel import FairClock
from holdfast.elastic.generation import Identity
from holdfast.elastic.lighthouse import StatusPage
from holdfast.elastic.membership_events import Bulletin, MembershipEvent
from holdfast.elastic.quorum_client import MembershipSettings
from holdfast.elastic.store import StoreClients
from holdfast.parallel.errors import MembershipError, PeerLost

logger = logging.getLogger("holdfast.agent")

_POLL_S = 0.05
_ATTEMPT_S = 1.0
_ATTEMPTS = 60
"""Attempts to reach a store again. They are counted, since this process may be stopped between."""
_JOIN_AFTER = 2.0
"""The heartbeat time-outs after which an unknown worker counts as joining: a worker that was just
left out is heard of once more."""
_GRACE_S = 2.0
"""Seconds after the Lighthouse was away before silence counts again."""


class BulletinFollower:
    """Posts to the bulletin of one generation, and receives the posts of others."""

    def __init__(
        self,
        stores: StoreClients,
        store: str,
        prefix: str,
        receive: Callable[[MembershipEvent], None],
    ) -> None:
        """Start the thread. It reaches a store that was gone for a while again, and misses nothing.

        Args:
            stores: the run's; other followers may use them too.
            store: the address of the store, HOST:PORT.
            receive: called in that thread with each event, also with one's own.
        """
        self.store, self._prefix, self._receive = store, prefix, receive
        self._stores = stores
        self._outgoing: queue.SimpleQueue[MembershipEvent | None] = queue.SimpleQueue()
        self._unposted: list[MembershipEvent] = []
        self._closing = threading.Event()
        self._answers = True
        self._thread = threading.Thread(target=self._run, name="holdfast-bulletin", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the store has answered the last time it was asked."""
        return self._answers and self._thread.is_alive()

    def post(self, event: MembershipEvent) -> None:
        """Post an event soon. It is lost if the store is gone for good."""
        self._outgoing.put(event)

    def close(self) -> None:
        """Post the remaining events and end, without waiting, since the store may not answer."""
        self._closing.set()
        self._outgoing.put(None)

    def _run(self) -> None:
        bulletin: Bulletin | None = None
        left = _ATTEMPTS
        while left > 0:
            try:
                store = self._stores.at(self.store, self._prefix)
                bulletin = bulletin or Bulletin(store)
                bulletin.store = store
                for event in bulletin.read():
                    self._receive(event)
                if not self._answers:
                    logger.warning("the events of %s come again", self._prefix)
                self._answers, left = True, _ATTEMPTS
                self._follow(bulletin)
                return
            except (PeerLost, RuntimeError) as error:
                if self._answers:
                    reason = str(error).splitlines()[0]
                    logger.warning("no events of %s at present: %s", self._prefix, reason)
                self._answers = False
                left -= 1
                if self._closing.wait(_ATTEMPT_S):
                    return

    def _follow(self, bulletin: Bulletin) -> None:
        """Post and receive until `close`. Raises RuntimeError if the store is gone."""
        while True:
            with contextlib.suppress(queue.Empty):
                event = self._outgoing.get(timeout=_POLL_S)
                if event is None:
                    return
                self._unposted.append(event)
            while self._unposted:
                bulletin.post(self._unposted[0])
                self._unposted.pop(0)
            for event in bulletin.read():
                self._receive(event)


class HeartbeatWatch:
    """Reports members that the Lighthouse has not heard in time, and workers that want to join.

    A few agents watch for all. While the Lighthouse is away, no member is suspected. Silence counts
    only while this watch and the Lighthouse run: a delay of the first is subtracted, and so is a
    time in which the Lighthouse has heard of no member at all.
    """

    def __init__(
        self,
        settings: MembershipSettings,
        receive: Callable[[MembershipEvent], None],
        *,
        lives: Callable[[Identity], bool] = lambda _: False,
        ages: Callable[[str], dict[Identity, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread of the watch.

        Args:
            receive: called in that thread with each event.
            lives: whether a worker of this node runs, as its agent sees it; it is not silent then.
            ages: returns seconds since each worker was heard of, given the run; None: the
                Lighthouse's.
        """
        self._settings, self._receive, self._lives = settings, receive, lives
        page = StatusPage(settings.lighthouse)
        self._ages, self._clock = ages or page.ages, clock
        self._fair = FairClock(clock)
        self._members: frozenset[Identity] = frozenset()
        self._generation = 0
        self._told: set[Identity] = set()
        self._unknown_since: dict[Identity, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(page,), name="holdfast-watch", daemon=True
        )
        self._thread.start()

    def watch(self, generation: int, members: frozenset[Identity]) -> None:
        """Watch the members of this generation from now on; none if the set is empty."""
        self._generation, self._members = generation, members

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, page: StatusPage) -> None:
        with contextlib.closing(page):
            self._watch_members()

    def _watch_members(self) -> None:
        interval_s = self._settings.heartbeat_ms / 1000
        judge_from_s, reachable = 0.0, True
        while not self._stop.wait(interval_s):
            self._fair.look()
            if not self._members:
                continue
            try:
                ages = self._ages(self._settings.run)
            except MembershipError as error:
                if reachable:
                    logger.warning(
                        "%s; generation %d goes on as it is, changes of membership wait",
                        error,
                        self._generation,
                    )
                reachable = False
                continue
            if not reachable:
                logger.warning("the Lighthouse at %s is back", self._settings.lighthouse)
                judge_from_s = self._clock() + _GRACE_S
            reachable = True
            if self._clock() > judge_from_s:
                for event in self.judge(ages, self._clock()):
                    logger.info("rank %s: %s", event.identity, event.cause)
                    self._receive(event)

    def judge(self, ages: dict[Identity, float], now_s: float) -> list[MembershipEvent]:
        """The events for heartbeats of these ages: a silence once, newcomers repeatedly."""
        generation, members = self._generation, self._members
        timeout_s = self._settings.silence_s
        asked_s, unheard_s = self._clock(), self._unheard_s(ages)
        alive = {
            identity
            for identity, age_s in ages.items()
            if age_s - unheard_s - self._fair.lost_since(asked_s - age_s) < timeout_s
        }
        self._told -= alive & members
        events = []
        for identity in sorted((ages.keys() & members) - alive - self._told):
            if self._lives(identity):
                continue
            cause = f"no heartbeat for {ages[identity]:.2f} s"
            events.append(
                MembershipEvent("silent", identity, cause, ages[identity], generation=generation)
            )
            self._told.add(identity)
        unknown = alive - members
        self._unknown_since = {i: self._unknown_since.get(i, now_s) for i in unknown}
        for identity, since_s in sorted(self._unknown_since.items()):
            if now_s - since_s > _JOIN_AFTER * timeout_s:
                events.append(
                    MembershipEvent("joining", identity, "a new worker wants to take part")
                )
                self._unknown_since[identity] = now_s
        return events

    def _unheard_s(self, ages: dict[Identity, float]) -> float:
        """Seconds for which the Lighthouse has heard of no member: it was itself delayed."""
        youngest_s = min((age for i, age in ages.items() if i in self._members), default=0.0)
        return max(0.0, youngest_s - self._settings.heartbeat_ms / 1000)
