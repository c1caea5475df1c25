"""Rendezvous stores: one in each agent, none in a worker."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from holdfast.parallel.errors import PeerLost

STORE_TIMEOUT_S = 60.0
_CONNECT_S = 2.0
"""Seconds to connect. A store exists before its address is told, so one that does not answer soon
is gone."""
_SILENCE = (
    (socket.TCP_USER_TIMEOUT, 3000),  # ms that what was sent may stay unacknowledged
    (socket.TCP_KEEPIDLE, 1),  # s
    (socket.TCP_KEEPINTVL, 1),
    (socket.TCP_KEEPCNT, 3),
)


def host_store(host: str) -> tuple[Store, str]:
    """A store in native threads of this process, and its HOST:PORT. It ends with the object."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, f"{host}:{store.port}"


def connect_store(address: str, timeout_s: float = STORE_TIMEOUT_S) -> Store:
    """A client of the store at HOST:PORT.

    Raises:
        PeerLost: no store answers at the address.
    """
    host, _, port = address.rpartition(":")
    patience = timedelta(seconds=min(_CONNECT_S, timeout_s))
    try:
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=patience)
        store.set_timeout(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise PeerLost(
            f"the rendezvous store at {address} does not answer: {str(error).splitlines()[0]}; "
            "its node is gone, or cannot be reached from here"
        ) from error
    _end_when_silent(int(port))
    return store


def _end_when_silent(port: int) -> None:
    """Have the kernel end connections to a port when the other machine stops answering.

    torch waits without limit for the answer of a store on a machine that is cut off: the time-out
    of `TCPStore` does not cover this (seen with torch 2.13).
    """
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                _end_connection_when_silent(int(entry), port)


def _end_connection_when_silent(descriptor: int, port: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        if internet and connection.getpeername()[1] == port:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _SILENCE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


class StoreClients:
    """Clients of the stores that generations use, one connection to each. For one thread at a time.

    A connection is kept from one generation to the next. The server looks up the name of each
    client that connects, and a slow name service then blocks it for all clients (5 s were seen).
    """

    def __init__(self, timeout_s: float = STORE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._clients: dict[str, Store] = {}

    def at(self, address: str, prefix: str) -> Store:
        """The store at HOST:PORT, below a prefix.

        Raises:
            PeerLost: no store answers at the address.
        """
        client = self._clients.get(address)
        if client is None or not _answers(client):
            client = self._clients[address] = connect_store(address, self._timeout_s)
        return PrefixStore(prefix, client)


def _answers(client: Store) -> bool:
    """Whether an earlier connection still works."""
    try:
        client.add("asked", 0)
    except RuntimeError:
        return False
    return True
