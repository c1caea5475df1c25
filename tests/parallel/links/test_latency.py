"""A message to a store behind a door is not held back on its way."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import closing

from holdfast.parallel.links import StoreAccess, Tunnels, derived_key, host_store

KEY = derived_key("a secret of this test", "store")


def connections() -> Iterator[tuple[tuple[object, object], bool]]:
    """The ends of this process's TCP connections, and whether each sends small writes at once."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry))) as found:
            if found.type == socket.SOCK_STREAM and found.family in (
                socket.AF_INET,
                socket.AF_INET6,
            ):
                ends = found.getsockname(), found.getpeername()
                yield ends, bool(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


def test_no_connection_on_the_way_to_a_store_waits_for_an_acknowledgement_to_send() -> None:
    before = dict(connections())
    store, address = host_store("127.0.0.1", KEY)
    with closing(store), closing(Tunnels()) as tunnels:
        client = StoreAccess(tunnels, KEY).connect(address)
        client.set("key", "value")
        assert client.get("key") == b"value"
        way = [at_once for ends, at_once in connections() if ends not in before]
    # Server to its own client, client to tunnel, tunnel to door, door to server: two ends of each.
    assert len(way) == 8
    assert all(way)
