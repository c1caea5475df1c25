"""Rendezvous stores behind doors: torch's TCPStore obeys whatever connects to it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store, TCPStore

from holdfast.parallel.errors import PeerLost
from holdfast.parallel.links.door import Door, listen, to_server
from holdfast.parallel.links.link import StrangerError
from holdfast.parallel.links.meeting import knock, until_answered
from holdfast.parallel.links.name_server import no_name_server
from holdfast.parallel.links.private_server import PrivateServer
from holdfast.parallel.links.tcp_table import LOOPBACK
from holdfast.parallel.links.tunnels import Tunnels

STORE_TIMEOUT_S = 60.0
_CONNECT_S = 2.0
"""Seconds to connect. A store exists before its address is told, so one that does not answer soon
is gone."""


class HostedStore:
    """A store in native threads of this process, behind a door. Local; make after the last fork."""

    def __init__(
        self, listening: socket.socket, key: bytes, on_stranger: Callable[[str], None] | None = None
    ) -> None:
        """Host the store.

        Args:
            listening: the socket of the door, which closes it.
            key: the door's.
            on_stranger: called once, in another thread, with a sentence about the first connection
                of a stranger.
        Raises:
            PeerLost: a stranger connected to the store before it was private.
        """
        inner = socket.create_server((LOOPBACK, 0))
        port, copy = inner.getsockname()[1], inner.dup()
        with no_name_server():
            self._store: Store | None = TCPStore(
                LOOPBACK,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=inner.detach(),
            )
        self._server = PrivateServer(copy)
        self._door = Door(listening, key, to_server(self._connect), on_stranger=on_stranger)

    def _connect(self) -> socket.socket:
        """A connection for the door, whose thread keeps this object as long as it is open."""
        return self._server.connect()

    def close(self) -> None:
        """End the store and its connections."""
        self._door.close()
        self._server.close()
        self._store = None


def host_store(
    host: str, key: bytes, on_stranger: Callable[[str], None] | None = None
) -> tuple[HostedStore, str]:
    """A store that the holders of a key reach, and its HOST:PORT; see `HostedStore`."""
    listening = listen(host)
    address = f"{host}:{listening.getsockname()[1]}"
    return HostedStore(listening, key, on_stranger), address


@dataclass(frozen=True, slots=True)
class StoreAccess:
    """What a client of a run's stores needs."""

    tunnels: Tunnels
    key: bytes

    def connect(
        self, address: str, timeout_s: float = STORE_TIMEOUT_S, patience_s: float = _CONNECT_S
    ) -> Store:
        """A client of the store at HOST:PORT. A machine that falls silent ends the connection.

        Args:
            timeout_s: the time-out of its operations.
            patience_s: seconds to connect.
        Raises:
            PeerLost: no store answers at the address.
        """
        end_s = time.monotonic() + min(patience_s, timeout_s)

        def left_s(_: str = "") -> float:
            return end_s - time.monotonic()

        host, _, port = self.tunnels.to(address, self.key).rpartition(":")
        try:
            # torch would write its stack to this process's output where nothing listens.
            until_answered(lambda within_s: knock(address, self.key, within_s), left_s)
            patience = timedelta(seconds=max(_CONNECT_S, left_s()))
            with no_name_server():  # the tunnel's address is a number
                store = TCPStore(
                    host, int(port), is_master=False, wait_for_workers=False, timeout=patience
                )
            store.set_timeout(timedelta(seconds=timeout_s))
        except (RuntimeError, TimeoutError, StrangerError) as error:
            reason = str(error).partition("\n")[0] or "no answer in time"
            raise PeerLost(
                f"the rendezvous store at {address} does not answer: {reason}; its node is gone, "
                "or cannot be reached from here"
            ) from error
        return store
