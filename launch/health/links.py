"""What a link between two nodes carries: its latency, its rate both ways, and their clocks' offset.

A node serves the others at a port of its own, in a thread for each, and measures towards another
one as its client. A client first shows the server's token, which the nodes of a job tell each other
over their rendezvous store; any other connection is dropped.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass

_TOKEN_BYTES = 32
_ASK = struct.Struct(">cQ")
_TIME = struct.Struct(">d")
_CLOCK, _TAKE, _GIVE = b"c", b"t", b"g"
_PINGS = 64
_FIRST_BYTES, _MOST_BYTES = 1 << 18, 1 << 28
_LONG_S = 0.25
"""Seconds that a transfer lasts whose rate counts, unless it is the largest."""
_PATIENCE_S = 30.0
_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What was measured between two nodes."""

    latency_s: float
    """Half of the shortest round trip."""
    bytes_per_s: float
    """In the slower direction."""


class LinkServer:
    """The end of this node's links for the others. Local."""

    def __init__(self, host: str) -> None:
        """Listen on an address of this machine, at a port of the kernel's choice.

        Raises:
            OSError: the address is not of this machine.
        """
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listening = socket.create_server((host, 0), family=family)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self.address = f"{host} {self._listening.getsockname()[1]} {self._token.hex()}"
        """Where and by which token others measure towards this node."""
        threading.Thread(target=self._accept, name="holdfast-links", daemon=True).start()

    def __enter__(self) -> LinkServer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            _prepare(connection)
            if not hmac.compare_digest(_read(connection, _TOKEN_BYTES), self._token):
                return
            while True:
                wanted, size = _ASK.unpack(_read(connection, _ASK.size))
                if wanted == _CLOCK:
                    connection.sendall(_TIME.pack(time.time()))
                elif wanted == _TAKE:
                    _pass(connection, min(size, _MOST_BYTES))
                    connection.sendall(_TIME.pack(0.0))
                elif wanted == _GIVE:
                    _fill(connection, min(size, _MOST_BYTES))
                else:
                    return


class LinkClient:
    """A connection to the `LinkServer` of another node."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            OSError: the other node cannot be reached.
        """
        host, port, token = address.split()
        self._connection = socket.create_connection((host, int(port)), timeout=_PATIENCE_S)
        _prepare(self._connection)
        self._connection.sendall(bytes.fromhex(token))

    def __enter__(self) -> LinkClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def clock(self) -> tuple[float, float]:
        """The other node's clock minus this one's in seconds, and the latency.

        Of the shortest of some round trips: the other clock was read in the middle of it, with an
        error of half of it at most.

        Raises:
            OSError, EOFError: the other node is gone.
        """
        best_s, offset_s = float("inf"), 0.0
        for _ in range(_PINGS):
            sent, began_s = time.time(), time.perf_counter()
            self._connection.sendall(_ASK.pack(_CLOCK, 0))
            (theirs,) = _TIME.unpack(_read(self._connection, _TIME.size))
            took_s = time.perf_counter() - began_s
            if took_s < best_s:
                best_s, offset_s = took_s, theirs - (sent + took_s / 2)
        return offset_s, best_s / 2

    def measure(self) -> LinkFacts:
        """The latency, and the rate of bytes in the slower direction.

        Raises:
            OSError, EOFError: the other node is gone.
        """
        _, latency_s = self.clock()
        return LinkFacts(latency_s, min(self._rate(_TAKE), self._rate(_GIVE)))

    def _rate(self, way: bytes) -> float:
        """Bytes a second, by the better of two transfers that last long enough.

        A process that gets no processor for a moment makes a link look slow.
        """
        size, best = _FIRST_BYTES, 0.0
        while True:
            began_s = time.perf_counter()
            self._connection.sendall(_ASK.pack(way, size))
            if way == _TAKE:
                _fill(self._connection, size)
                _read(self._connection, _TIME.size)
            else:
                _pass(self._connection, size)
            took_s = time.perf_counter() - began_s
            if took_s < _LONG_S and size < _MOST_BYTES:
                size *= 4
            elif best:
                return max(best, size / took_s)
            else:
                best = size / took_s


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(_PATIENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _read(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises EOFError if the other end is gone."""
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise EOFError("the other node has left")
        found += part
    return found


def _pass(connection: socket.socket, size: int) -> None:
    """Take so many bytes and forget them. Raises EOFError if the other end is gone."""
    piece = bytearray(_PIECE)
    while size:
        taken = connection.recv_into(piece, min(size, _PIECE))
        if not taken:
            raise EOFError("the other node has left")
        size -= taken


def _fill(connection: socket.socket, size: int) -> None:
    """Send so many bytes."""
    piece = memoryview(bytes(_PIECE))
    while size:
        part = min(size, _PIECE)
        connection.sendall(piece[:part])
        size -= part
