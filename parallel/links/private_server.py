"""Servers on 127.0.0.1 that only their own process can connect to.

torch's TCPStore and torchft's servers obey each process that connects to them, and any user of the
machine can connect to a port on the loopback. So the kernel is given a key for the listening
socket: it drops each segment that is not signed with it (RFC 2385). Only this process has the key.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterator

from holdfast.parallel.errors import PeerLost
from holdfast.parallel.links.tcp_table import LISTEN, LOOPBACK, is_open_in, table

logger = logging.getLogger("holdfast.links")

_CONNECT_S = 2.0
_TCP_MD5SIG_EXT = 32
_SIGNATURE = struct.Struct("=H126xBBHi80s")
"""tcp_md5sig: address, flags, length of its prefix, of the key, interface, and the key."""
_ANY_ADDRESS = (socket.AF_INET, 1, 0)
"""The address's family, the flag TCP_MD5SIG_FLAG_PREFIX, and a prefix that all addresses have."""
_KEY_BYTES = 32


class PrivateServer:
    """A listening socket of this process that only this process can connect to. Local."""

    def __init__(self, listening: socket.socket) -> None:
        """Close it to all others. The connections that it has must be of this process.

        Args:
            listening: the socket, or a copy of its descriptor; it is closed with this object.
        Raises:
            PeerLost: another process was connected before.
        """
        self._listening = listening
        self._port = listening.getsockname()[1]
        self._key = os.urandom(_KEY_BYTES)
        try:
            _sign(listening, self._key)
        except OSError as error:
            self._key = b""
            where = f"{LOOPBACK}:{self._port}"
            logger.warning("any user of this machine can connect to %s: %s", where, error)
        _check_own(self._port)

    @staticmethod
    def at(port: int) -> PrivateServer:
        """The server on 127.0.0.1:`port`, whose listening socket a library in this process has."""
        return PrivateServer(_listening_at(port))

    def connect(self) -> socket.socket:
        """A new connection to the server.

        Raises:
            OSError: the server does not accept it.
        """
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.settimeout(_CONNECT_S)
            if self._key:
                _sign(made, self._key)
            made.connect((LOOPBACK, self._port))
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Let go of the listening socket; the library that has it ends the server."""
        self._listening.close()


def close_to_all(port: int) -> None:
    """Let nothing connect to a server on 127.0.0.1 of this process that needs no clients.

    Raises:
        PeerLost: another process was connected before.
    """
    PrivateServer.at(port).close()


def _listening_at(port: int) -> socket.socket:
    """A copy of the descriptor of this process that listens at a port."""
    for candidate in _sockets():
        with contextlib.suppress(OSError):
            if (
                candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and candidate.family == socket.AF_INET
                and candidate.getsockname()[1] == port
            ):
                return candidate
        candidate.close()
    raise PeerLost(f"no server of this process listens at {LOOPBACK}:{port}")


def _sockets() -> Iterator[socket.socket]:
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                yield socket.socket(fileno=os.dup(int(entry)))


def _check_own(port: int) -> None:
    """Raise if another process connected to a port before the kernel had the key."""
    ends = list(table())
    clients = {end.local: end.inode for end in ends if end.remote == port}
    for end in ends:
        was_made = end.local == port and end.state != LISTEN
        if was_made and not is_open_in(clients.get(end.remote, 0), [os.getpid()]):
            raise PeerLost(
                f"a stranger connected to {LOOPBACK}:{port} while a server began there; start the "
                "run again"
            )


def _sign(connection: socket.socket, key: bytes) -> None:
    """Sign what a socket sends, and let it receive only what has the signature.

    A connection that is accepted has the key of the listening socket. The option needs no rights.
    """
    described = _SIGNATURE.pack(*_ANY_ADDRESS, len(key), 0, key)
    connection.setsockopt(socket.IPPROTO_TCP, _TCP_MD5SIG_EXT, described)
