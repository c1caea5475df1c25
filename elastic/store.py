"""Rendezvous stores: one in each agent, none in a worker."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from holdfast.elastic.generation import Generation
from holdfast.parallel.errors import PeerLost

STORE_TIMEOUT_S = 60.0


def host_store(host: str) -> tuple[Store, str]:
    """A store that this process hosts in native threads, and its HOST:PORT. It ends with the object."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, f"{host}:{store.port}"


def connect_store(address: str, timeout_s: float = STORE_TIMEOUT_S) -> Store:
    """A client of the store at HOST:PORT.

    Raises:
        PeerLost: nobody answers there.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise PeerLost(
            f"the rendezvous store at {address} does not answer: {str(error).splitlines()[0]}; its node "
            "is gone, or cannot be reached from here"
        ) from error


def generation_store(generation: Generation, timeout_s: float = STORE_TIMEOUT_S) -> Store:
    """The store that a generation uses, below its own prefix.

    Raises:
        PeerLost: nobody answers there.
    """
    return PrefixStore(generation.prefix, connect_store(generation.store, timeout_s))
