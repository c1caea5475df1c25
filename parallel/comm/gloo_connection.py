"""A gloo connection to one peer: made, kept over a membership change, aborted.

Each connection is a torch process group of two ranks, so that it can be closed without touching any
other.

Measured on torch 2.13: gloo's own `abort()` does nothing. But giving up a receive breaks its whole
process group, which frees every other thread at once, even if the peer is stopped or cut off.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from holdfast.parallel.comm.gloo_messages import ConnectionOwner, Message
from holdfast.parallel.comm.p2p_collectives import lost
from holdfast.parallel.comm.protocol import AbortSignal
from holdfast.parallel.comm.tags import BREAKING, HANDSHAKES
from holdfast.parallel.errors import PeerLost

if TYPE_CHECKING:
    from torch.distributed import Store

_NOTHING = "-"
_SHORTEST_POLL_S, _LONGEST_POLL_S = 1e-4, 1e-2

logger = logging.getLogger("holdfast.comm")


class Rendezvous(dist.Store):
    """The store in which one process group forms. It never blocks other threads and is left empty.

    gloo's threads would wait inside the client of the store, which serves one call at a time. So
    the wait happens here, and an abort ends it. Each side publishes its address, and the other side
    claims it by deleting it. The side that gives up first withdraws its address. If the peer has
    already claimed it, the peer is connecting, so this side completes the connection.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        signal: AbortSignal,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Local.

        Args:
            name: the name of the connection, the same on both sides.
            timeout_s: how long the other side may take to come, by `clock`.
        """
        super().__init__()
        self._store: Any = store
        self._name = name
        self._signal = signal
        self._timeout_s, self._clock, self._sleep = timeout_s, clock, sleep
        self._published: dict[str, bytes] = {}
        self._claimed: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._published[key] = value
        self._store.set(f"{self._name}/{key}", value)

    def get(self, key: str) -> bytes:
        return self._published.get(key) or self._claimed[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        deadline = self._clock() + self._timeout_s
        for key in keys:
            if key in self._published or key in self._claimed:
                continue
            pause_s = _SHORTEST_POLL_S
            while not self._claim(key):
                late = self._clock() > deadline
                if (late or self._signal.reason is not None) and self._withdraw():
                    self._signal.check()
                    raise RuntimeError(f"the peer did not come within {self._timeout_s:g} s")
                self._sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def _claim(self, key: str) -> bool:
        full = f"{self._name}/{key}"
        # `get` would wait; this returns the expected value if there is no such key.
        value = self._store.compare_set(full, _NOTHING, _NOTHING)
        if value == _NOTHING.encode() or not self._store.delete_key(full):
            return False
        self._claimed[key] = value
        return True

    def _withdraw(self) -> bool:
        return all(self._store.delete_key(f"{self._name}/{key}") for key in self._published)

    def has_extended_api(self) -> bool:
        return False


class Connection:
    """The connection to one peer for one group of ranks.

    A thread of its own makes it when the first message is posted, in whatever order ranks first
    need each other. Messages posted before it is ready are queued. At an edit, both sides shake
    hands before anything else, so that no message of the new generation meets one of the old. If
    one side has dropped the connection, both make a new one at the next message.

    Its attributes are more than a dozen because one lock guards one state: the names of the
    connection (mesh, name, peer), the process group, its progress, and its messages.
    """

    def __init__(self, mesh: ConnectionOwner, name: str, peer: int) -> None:
        self.mesh = mesh
        self.name = name
        self.peer = peer
        self.open: set[Message] = set()
        """Messages without a known end. They survive an abort: gloo may hold their buffers."""
        self.is_closed = False
        """Whether gloo has stopped writing and reading."""
        self._peer_index = int(mesh.rank < peer)
        self._group: Any = None
        self._is_ready = False
        self._is_connecting = False
        self._failure: BaseException | None = None
        self._queue: list[Message] = []
        self._lock = threading.Lock()
        self._settled = threading.Event()

    def post(self, message: Message) -> None:
        """Send or receive `message` now, or once the connection is ready. Does not block."""
        # Before the check: an abort that comes after it closes this connection.
        self.open.add(message)
        try:
            message.signal.check()
            if not self._is_ready:
                with self._lock:
                    if self._failure is not None:
                        raise lost(message.operation, self.name, self.peer, self._failure)
                    if not self._is_ready:
                        self._queue.append(message)
                        self._connect_in_background()
                        return
        except PeerLost:
            self.open.discard(message)
            raise
        try:
            self._start(message)
        except RuntimeError as error:
            message.signal.check()
            raise lost(message.operation, self.name, self.peer, error) from error

    def _start(self, message: Message) -> None:
        group = self._group
        if group is None:
            raise RuntimeError(str(self._failure))
        post = group.send if message.is_send else group.recv
        message.work = post([message.tensor], self._peer_index, message.tag)
        self.mesh.recorder.started(message.number)

    def wait_until_posted(self, message: Message) -> None:
        self._settled.wait()
        message.signal.check()
        failure = message.error or self._failure
        if failure is not None:
            raise lost(message.operation, self.name, self.peer, failure)

    def _connect_in_background(self) -> None:
        if not self._is_connecting:
            self._is_connecting = True
            in_thread("connect", self._connect, self.mesh.signal)

    def _connect(self, signal: AbortSignal) -> None:
        failure: BaseException | None = None
        group = None
        try:
            group = self.mesh.connect(self.name, self.peer, signal)
        except (RuntimeError, PeerLost) as error:
            failure = error
        with self._lock:
            self._group = group
            self._failure = self._failure or failure
            if self._failure is None:
                self._go_on()
            self._queue = []
            self._is_connecting = False
            self._settled.set()
        if self._failure is not None:
            self.abort(str(self._failure))  # closes what was aborted while it was being made

    def _go_on(self) -> None:
        """Mark the connection ready and post the queued messages."""
        for message in self._queue:
            try:
                self._start(message)
            except RuntimeError as error:
                message.error = error
        self._queue = []
        self._is_ready = True

    def await_handshake(self, handshake: Handshake) -> None:
        """Continue once the peer is in the generation too; reconnect if it must."""
        answered = handshake.wait()
        with self._lock:
            self._is_connecting = False
            if self._failure is not None:
                return
            if answered:
                self._go_on()
                self._settled.set()
                return
            self._group = None
            if self._queue:
                self._connect_in_background()

    def abort(self, reason: str) -> None:
        """Make all waits and posts raise `PeerLost`. From any thread; does not block."""
        with self._lock:
            self._failure = self._failure or PeerLost(reason)
            self._is_ready = False
            group, self._group = self._group, None
        self._settled.set()
        if group is not None:
            self.mesh.closing.append(in_thread("close", self._close, group))

    def _close(self, group: Any) -> None:
        """Give up a receive without a sender: gloo then closes the connection and ends waits."""
        try:
            never = group.recv([torch.empty(1)], self._peer_index, BREAKING.tag(0))
            never.wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            logger.debug("closed connection with rank %d in %s: %s", self.peer, self.name, error)
        # Not before: gloo may write to the buffers of these messages until the connection is
        # closed.
        self.is_closed = True
        for message in tuple(self.open):
            if message.interruptible is not None:
                message.interruptible.cancel()
        self.open.clear()

    @property
    def is_idle(self) -> bool:
        return not (self.open or self._is_connecting or self._queue)

    @property
    def stands(self) -> bool:
        """Whether messages can be posted on it and none is under way."""
        return self._is_ready and self.is_idle

    @property
    def is_whole(self) -> bool:
        """Whether no message is under way on it and it has not been given up."""
        return self.is_idle and self._failure is None

    def shake_hands(self, generation: int) -> Handshake | None:
        """Tell the peer that this side keeps the idle connection for `generation`. Local.

        Returns:
            The argument of `await_handshake`; None if this connection cannot be kept.
        """
        with self._lock:
            group = self._group
            if not self.is_idle or self._failure is not None or group is None:
                return None
            try:
                handshake = Handshake(group, self._peer_index, generation)
            except RuntimeError:
                return None
            self._is_ready = False
            self._is_connecting = True
            self._settled.clear()
            return handshake


class Handshake:
    """The handshake of two ranks: both are in a generation and still have the connection."""

    def __init__(self, group: Any, peer_index: int, generation: int) -> None:
        tag = HANDSHAKES.wrapped(generation)
        self._group = group  # alive for as long as its works are waited for
        self._buffers = (torch.empty(1), torch.empty(1))
        self._works = (
            group.recv([self._buffers[0]], peer_index, tag),
            group.send([self._buffers[1]], peer_index, tag),
        )

    def wait(self) -> bool:
        """Wait for the peer's answer; False if the peer has dropped the connection."""
        try:
            for work in self._works:
                work.wait()
        except RuntimeError:
            return False
        return True


def await_handshakes(handshakes: Sequence[tuple[Connection, Handshake]]) -> None:
    """Await each handshake in turn; each depends only on its own peer."""
    for connection, handshake in handshakes:
        connection.await_handshake(handshake)


def in_thread(what: str, function: Callable[..., None], *arguments: object) -> threading.Thread:
    name = f"holdfast-comm-{what}"
    thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
    thread.start()
    return thread
