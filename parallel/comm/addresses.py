"""The network addresses of this machine. Needs no torch."""

from __future__ import annotations

import ipaddress
import socket

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


def own_address_towards(host: str, port: int = 9) -> str:
    """The address of this machine as `host` sees it. Local; nothing is sent.

    Raises:
        OSError: the name is unknown, or there is no route to it.
    """
    kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether an address, given as numbers, is reached by this machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
