"""Clients of the rendezvous stores: each agent has a store, and no worker has one."""

from __future__ import annotations

import threading

from torch.distributed import PrefixStore, Store

from holdfast.parallel.links import STORE_TIMEOUT_S, StoreAccess


class StoreClients:
    """Clients of the stores that generations use, from any thread.

    Connections are kept from one generation to the next: a new one costs a greeting at the door.
    """

    def __init__(self, access: StoreAccess, timeout_s: float = STORE_TIMEOUT_S) -> None:
        self._access, self._timeout_s = access, timeout_s
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, bool], Store] = {}
        """By the store's address, and whether it is the second connection."""

    def at(self, address: str, prefix: str) -> KeptStore:
        """The store at HOST:PORT, below a prefix. Its clones share a second connection.

        Raises:
            PeerLost: no store answers at the address.
        """
        return KeptStore(self, address, prefix)

    def client(self, address: str, *, second: bool) -> Store:
        """The connection to the store at HOST:PORT. One that is broken is made again."""
        with self._lock:
            client = self._clients.get((address, second))
        if client is None or not _answers(client):
            client = self._access.connect(address, self._timeout_s)
            with self._lock:
                self._clients[address, second] = client
        return client


class KeptStore(PrefixStore):
    """A store below a prefix; the connections of its clones are kept too.

    torch demands the inheritance. A wait blocks all users of a connection, so nothing may wait in a
    clone.
    """

    def __init__(self, clients: StoreClients, address: str, prefix: str) -> None:
        super().__init__(prefix, clients.client(address, second=False))
        self._clients, self._address, self._prefix = clients, address, prefix

    def clone(self) -> Store:
        return PrefixStore(self._prefix, self._clients.client(self._address, second=True))


def _answers(client: Store) -> bool:
    """Whether an earlier connection still works."""
    try:
        client.add("asked", 0)
    except RuntimeError:
        return False
    return True
