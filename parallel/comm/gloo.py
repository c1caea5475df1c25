"""Communicators over gloo (TCP): one connection per group and peer, made at first use.

Gradients, parameters and what all members exchange have a connection for each direction. gloo sends
a message once the receiver's notice that it expects it has come, and on one connection that notice
would wait behind all that the receiver is sending meanwhile: the link would stand idle for up to
half of its time.

Separate connections make aborts and membership changes cheap: an abort closes only those with a
message under way, and an edit keeps the idle ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from holdfast.parallel.comm.addresses import LOOPBACK_NAMES, is_loopback, own_address_towards
from holdfast.parallel.comm.flight_recorder import FlightRecorder
from holdfast.parallel.comm.gloo_connection import (
    Connection,
    Handshake,
    Rendezvous,
    await_handshakes,
    in_thread,
)
from holdfast.parallel.comm.gloo_messages import Message, Messages
from holdfast.parallel.comm.gloo_waits import InterruptibleWait
from holdfast.parallel.comm.p2p_collectives import PairwiseCommunicator
from holdfast.parallel.comm.protocol import AbortSignal, MembershipChange
from holdfast.parallel.comm.tags import is_bulk
from holdfast.parallel.errors import HoldfastError, PeerLost, first_line

if TYPE_CHECKING:
    from torch.distributed import Store

_CONNECT_S = 20.0
"""Seconds for a TCP handshake between two present ranks; after that, one of them has given up."""


class _Count:
    """A question to the store, which is waited for as works of gloo are."""

    def __init__(self, store: Store, name: str, amount: int) -> None:
        self._store, self._name, self._amount = store, name, amount
        self.value = 0
        """The answer."""

    def wait(self, timeout: timedelta) -> None:
        self.value = self._store.add(self._name, self._amount)


def _nothing(place: int) -> None:
    """What is called before and after a question."""


class GlooMesh:
    """All connections of one rank, and the parts that its gloo communicators share."""

    def __init__(
        self,
        store: Store,
        rank: int,
        *,
        device: object,
        timeout_s: float,
        signal: AbortSignal,
        recorder: FlightRecorder,
    ) -> None:
        """No connection is made yet.

        Args:
            store: the rendezvous store that all ranks reach.
            device: the result of `gloo_device`.
            timeout_s: the time after which waiters of an operation get `PeerLost`.
        """
        self.rank = rank
        self.recorder = recorder
        self.timeout_s = timeout_s
        self.timeout = timedelta(seconds=timeout_s)
        self._shared_store = store
        self._device = device
        self._connections: dict[tuple[str, int], Connection] = {}
        self._lock = threading.Lock()
        self.closing: list[threading.Thread] = []
        """Threads that close connections; until one ends gloo may write to its receive buffers."""
        self._asking: InterruptibleWait | None = None
        """The wait for an answer of the store, which may be on a node that is cut off."""
        self._enter(signal)

    def _enter(self, signal: AbortSignal) -> None:
        self.signal = signal
        signal.listen(self._abort_busy)

    def connection(self, name: str, peer: int) -> Connection:
        with self._lock:
            connection = self._connections.get((name, peer))
            if connection is None:
                connection = self._connections[(name, peer)] = Connection(self, name, peer)
            return connection

    @functools.cached_property
    def _store(self) -> Store:
        """A client of its own, since a wait on the shared client would block every connection."""
        shared: Any = self._shared_store
        return shared.clone()

    @functools.cached_property
    def _counters(self) -> Store:
        """Another client of its own, for counters that the training thread asks for."""
        shared: Any = self._shared_store
        return shared.clone()

    def count(self, name: str, amount: int) -> int:
        """See `Groups.count`."""
        asked = _Count(self._counters, f"count/{self.signal.generation}/{name}", amount)
        self._asking = InterruptibleWait([asked], self.timeout, _nothing, _nothing)
        try:
            self.signal.check()
            self._asking.wait()
        except RuntimeError:
            self.signal.check()
            raise
        return asked.value

    def forget_count(self, name: str) -> None:
        """See `Groups.forget_count`."""
        self._counters.delete_key(f"count/{self.signal.generation}/{name}")

    def connect(self, name: str, peer: int, signal: AbortSignal) -> Any:
        """A process group of this rank and `peer`. Collective over both.

        Raises:
            PeerLost: the generation was aborted.
            RuntimeError: the peer did not connect, or the store is gone.
        """
        low, high = sorted((self.rank, peer))
        where = f"{name}/{low}-{high}/{signal.generation}"
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [self._device]
        options._threads = 0  # they run gloo's collectives; only messages are used
        # The limit of connecting alone, once the peer is there; each wait has its own limit.
        options._timeout = timedelta(seconds=min(self.timeout_s, _CONNECT_S))
        rendezvous = Rendezvous(self._store, where, signal, self.timeout_s)
        return gloo(rendezvous, int(self.rank > peer), 2, options)

    def _abort_busy(self, reason: str) -> None:
        if self._asking is not None:
            self._asking.cancel()
        with self._lock:
            connections = tuple(self._connections.values())
        for connection in connections:
            if not connection.is_idle:
                connection.abort(reason)

    @property
    def is_whole(self) -> bool:
        """Whether all connections stay usable, as `MembershipChange.kept` requires. Local."""
        with self._lock:
            return self.signal.reason is None and all(
                connection.is_whole for connection in self._connections.values()
            )

    def edit(self, change: MembershipChange, signal: AbortSignal) -> None:
        """Enter the generation of `change`, once. Local.

        Connections to ranks that changed, and those with messages under way, are dropped. For each
        other connection the peers ask each other whether both still have it, unless that is known
        (`change.kept`). After the return, gloo writes to no buffer of the old generation.

        Args:
            signal: the abort signal of the new generation.
        """
        if change.generation == self.signal.generation:
            return
        if change.store is not None:
            self._shared_store = change.store
            self.__dict__.pop("_store", None)
        self.__dict__.pop("_counters", None)  # a wait that was cancelled may still use it
        handshakes: list[tuple[Connection, Handshake]] = []
        with self._lock:
            for (name, peer), connection in tuple(self._connections.items()):
                gone = peer in change.changed
                if change.kept and not gone and connection.stands:
                    continue
                handshake = None if gone else connection.shake_hands(change.generation)
                if handshake is not None:
                    handshakes.append((connection, handshake))
                else:
                    del self._connections[(name, peer)]
                    connection.abort(
                        f"rank {peer} is not in reach of generation {change.generation}"
                    )
        if handshakes:
            in_thread("handshake", await_handshakes, handshakes)
        closing, self.closing = self.closing, []
        for thread in closing:
            thread.join(_CONNECT_S)
        self.recorder.set_generation(change.generation)
        self._enter(signal)


class GlooCommunicator(PairwiseCommunicator):
    """A group of ranks over gloo (TCP). Exact-mode safe."""

    def __init__(
        self,
        store: Store,
        name: str,
        ranks: Sequence[int],
        rank: int,
        *,
        device: object,
        timeout_s: float,
        mesh: GlooMesh | None = None,
    ) -> None:
        """Local: members connect at first need, under the `name` that all of them give.

        Args:
            store: the rendezvous store that all members reach.
            device: the result of `gloo_device`; groups of one process may share it.
            timeout_s: the time after which waiters of an operation get `PeerLost`.
            mesh: the connections of a rank with several groups; None: connections of this group
                alone.
        """
        if mesh is None:
            mesh = GlooMesh(
                store,
                rank,
                device=device,
                timeout_s=timeout_s,
                signal=AbortSignal(0),
                recorder=FlightRecorder(rank),
            )
        self.mesh = mesh
        super().__init__(name, ranks, rank, mesh.signal, mesh.recorder)
        self._connections: dict[tuple[int, str], Connection] = {}

    @classmethod
    def over(cls, mesh: GlooMesh, name: str, ranks: Sequence[int]) -> GlooCommunicator:
        """A group over connections that a rank already has. Local."""
        store, device = mesh._shared_store, mesh._device
        return cls(
            store, name, ranks, mesh.rank, device=device, timeout_s=mesh.timeout_s, mesh=mesh
        )

    def _message(
        self, tensor: Tensor, peer: int, tag: int, operation: str, *, is_send: bool
    ) -> Message:
        lane = (">" if is_send == (self.mesh.rank < peer) else "<") if is_bulk(tag) else ""
        connection = self._connections.get((peer, lane))
        if connection is None:
            assert peer in self._ranks, f"rank {peer} is not a member of {self._ranks}"
            assert peer != self.mesh.rank, "a rank sends nothing to itself"
            connection = self.mesh.connection(self._name + lane, peer)
            self._connections[peer, lane] = connection
        number = self._recorder.post(
            self._group_code,
            operation,
            "send" if is_send else "receive",
            peer,
            tensor.numel() * tensor.element_size(),
            tag,
        )
        message = Message(connection, tensor, tag, operation, number, is_send=is_send)
        try:
            connection.post(message)
        except PeerLost:
            self._recorder.finished(number, failed=True)
            raise
        return message

    def _together(self, handles: Sequence[Message]) -> Messages:
        return Messages(handles)

    def edit(
        self, ranks: Sequence[int], change: MembershipChange, signal: AbortSignal
    ) -> GlooCommunicator:
        """See `Communicator.edit`. Local: a connection is checked or made at its next use."""
        self.mesh.edit(change, signal)
        if tuple(ranks) != self._ranks or change.changed & set(ranks):
            return GlooCommunicator.over(self.mesh, self._name, ranks)
        self._connections.clear()
        self._enter(self.mesh.signal)
        return self


def gloo_device(host: str) -> object:
    """A gloo transport bound to the address of this machine that `host`, the store's machine, sees.

    GLOO_SOCKET_IFNAME, if set, names another network interface.

    Raises:
        HoldfastError: nothing can listen there: the interface is unknown, or no port is free.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    try:
        return _behind_computation(partial(_gloo_device, host, interface))
    except RuntimeError as error:
        raise HoldfastError(
            f"this rank cannot listen for others on {interface or 'the address that they see'}: "
            f"{first_line(error)}; check GLOO_SOCKET_IFNAME, and whether local ports are "
            "free (net.ipv4.ip_local_port_range)"
        ) from error


def _behind_computation(make: Callable[[], object]) -> object:
    """What `make` makes, whose threads never take a core from one that computes.

    gloo's thread polls without pause while another has the connection's lock. Woken by each
    message, it would stop that very thread, and those of other ranks: 5 % of a pass of a layer of
    experts with two ranks a core. Threads inherit the class of the one that begins them.
    """
    if not hasattr(os, "SCHED_BATCH"):  # not Linux
        return make()

    def in_class() -> object:
        with contextlib.suppress(OSError):  # forbidden in some containers
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(in_class).result()


def _gloo_device(host: str, interface: str) -> object:
    if interface:
        return dist.ProcessGroupGloo.create_device(interface=interface)
    if host in LOOPBACK_NAMES:
        return dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    try:
        own = own_address_towards(host)
    except OSError:
        return dist.ProcessGroupGloo.create_default_device()
    if is_loopback(own):  # the store is here, by a name that other machines know otherwise
        return dist.ProcessGroupGloo.create_default_device()
    return dist.ProcessGroupGloo.create_device(hostname=own)
