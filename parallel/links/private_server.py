"""Servers on 127.0.0.1 that only their own process can connect to.

torch's TCPStore and torchft's servers obey each process that connects to them, and any user of the
machine can connect to a port on the loopback. So the kernel drops what arrives at the listening
socket, by a socket filter, except from one port: the one that this process has bound for its next
connection. A connection that is made keeps the filter that it was made under.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator

from holdfast.parallel.errors import PeerLost
from holdfast.parallel.links.tcp_table import (
    ESTABLISHED,
    LISTEN,
    LOOPBACK,
    connection,
    is_open_in,
    table,
)

logger = logging.getLogger("holdfast.links")

_CONNECT_S = 2.0
_LOOK_S = 0.0005
_SO_ATTACH_FILTER = getattr(socket, "SO_ATTACH_FILTER", 26)
_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOSYS)
"""The errors of a kernel that has no socket filters, as in some sandboxes."""
_Instruction = tuple[int, int, int, int]
_DROP: _Instruction = (0x06, 0, 0, 0)
_KEEP: _Instruction = (0x06, 0, 0, 0xFFFFFFFF)


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
        self._lock = threading.Lock()
        _attach(listening, [_DROP])
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
            made.bind((LOOPBACK, 0))  # no other process has this port as long as `made` is open
            own = made.getsockname()[1]
            with self._lock:
                _attach(self._listening, _only(own))
                try:
                    made.connect((LOOPBACK, self._port))
                    self._await(own)
                finally:
                    _attach(self._listening, [_DROP])
        except BaseException:
            made.close()
            raise
        return made

    def _await(self, own: int) -> None:
        """Wait until the last packet of the handshake has passed the filter."""
        deadline = time.monotonic() + _CONNECT_S
        while time.monotonic() < deadline:
            found = connection(self._port, own)
            if found is not None and found.state == ESTABLISHED:
                return
            time.sleep(_LOOK_S)
        raise TimeoutError("a private server did not accept a connection")

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
    """Raise if a connection to a port was made by another process, before the filter was there."""
    ends = list(table())
    clients = {end.local: end.inode for end in ends if end.remote == port}
    for end in ends:
        was_made = end.local == port and end.state != LISTEN
        if was_made and not is_open_in(clients.get(end.remote, 0), [os.getpid()]):
            raise PeerLost(
                f"a stranger connected to {LOOPBACK}:{port} while a server began there; start the "
                "run again"
            )


def _only(port: int) -> list[_Instruction]:
    """The filter that keeps packets from 127.0.0.1:`port`: offsets are in the TCP header, and below
    SKF_NET_OFF (-0x100000) in the IP header."""
    address = int.from_bytes(socket.inet_aton(LOOPBACK), "big")
    return [
        (0x28, 0, 0, 0),  # load the source port
        (0x15, 0, 3, port),  # another: drop
        (0x20, 0, 0, 0x100000000 - 0x100000 + 12),  # load the source address
        (0x15, 0, 1, address),  # another: drop
        _KEEP,
        _DROP,
    ]


def _attach(listening: socket.socket, program: list[_Instruction]) -> None:
    """Give a socket a filter; a kernel that has none leaves it open to this machine's users."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    described = struct.pack("HL", len(program), ctypes.addressof(code))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        where = "{}:{}".format(*listening.getsockname()[:2])
        logger.warning("any user of this machine can connect to %s: %s", where, error)
