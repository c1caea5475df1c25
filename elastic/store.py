"""Clients of the rendezvous stores: each agent has a store, and no worker has one."""

from __future__ import annotations

from torch.distributed import PrefixStore, Store

from holdfast.parallel.links import STORE_TIMEOUT_S, StoreAccess


class StoreClients:
    """Clients of the stores that generations use, one connection to each. For one thread at a time.

    A connection is kept from one generation to the next.
    """

    def __init__(self, access: StoreAccess, timeout_s: float = STORE_TIMEOUT_S) -> None:
        self._access, self._timeout_s = access, timeout_s
        self._clients: dict[str, Store] = {}

    def at(self, address: str, prefix: str) -> Store:
        """The store at HOST:PORT, below a prefix.

        Raises:
            PeerLost: no store answers at the address.
        """
        client = self._clients.get(address)
        if client is None or not _answers(client):
            client = self._clients[address] = self._access.connect(address, self._timeout_s)
        return PrefixStore(prefix, client)


def _answers(client: Store) -> bool:
    """Whether an earlier connection still works."""
    try:
        client.add("asked", 0)
    except RuntimeError:
        return False
    return True
