"""The kernel's table of TCP connections on 127.0.0.1: whose the other end of a connection is."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
LISTEN = 10
_SOCK_DIAG_BY_FAMILY = 20
_NETLINK_SOCK_DIAG = 4
_NLM_F_REQUEST = 1
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI2s2s16s16sIII")
"""inet_diag_req_v2: family, protocol, states, and the connection."""
_ANSWER = struct.Struct("=BBBB")
_INODE_AT = _HEADER.size + 68
_NUMBER = struct.Struct("=I")
_ALL = 0xFFFFFFFF
_MAPPED = "0000000000000000FFFF0000"
"""The beginning of an IPv4 address in the table of IPv6, as the kernel writes it here."""
_ANSWER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Connection:
    """One end of a connection on 127.0.0.1."""

    local: int
    """Its own port."""
    remote: int
    """The port of the other end."""
    state: int
    inode: int
    """The number of its socket, by which the process that has it open is found; 0: none has."""


def connection(local: int, remote: int) -> Connection | None:
    """The end with this port of the connection to port `remote`; None if there is none."""
    with contextlib.suppress(OSError):
        if (found := _asked(local, remote)) is not None:
            return found
    return next((end for end in table() if (end.local, end.remote) == (local, remote)), None)


def _asked(local: int, remote: int) -> Connection | None:
    """The kernel's answer about one connection: it takes no longer where there are many."""
    here = there = socket.inet_aton(LOOPBACK).ljust(16, b"\0")
    ports = (local.to_bytes(2, "big"), remote.to_bytes(2, "big"))
    kinds = (socket.AF_INET, socket.IPPROTO_TCP, 0, _ALL)
    request = _REQUEST.pack(*kinds, *ports, here, there, 0, _ALL, _ALL)
    length = _HEADER.size + len(request)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(1.0)
        kernel.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
        answer = kernel.recv(_ANSWER_BYTES)
    if _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    state = _ANSWER.unpack_from(answer, _HEADER.size)[1]
    return Connection(local, remote, state, _NUMBER.unpack_from(answer, _INODE_AT)[0])


def table() -> Iterator[Connection]:
    """All ends on 127.0.0.1, those that listen included."""
    here = f"{_NUMBER.unpack(socket.inet_aton(LOOPBACK))[0]:08X}"
    for name, written in (("tcp", here), ("tcp6", _MAPPED + here)):
        with contextlib.suppress(FileNotFoundError):  # a machine without IPv6
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                address, port = fields[1].split(":")
                if address == written:
                    remote = int(fields[2].partition(":")[2], 16)
                    yield Connection(int(port, 16), remote, int(fields[3], 16), int(fields[9]))


def is_open_in(inode: int, pids: Iterable[int]) -> bool:
    """Whether one of these processes, all of this user, has a socket open."""
    wanted = f"socket:[{inode}]"
    for pid in pids if inode else ():
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):  # the process has ended
            for name in reversed(os.listdir(folder)):  # the newest is mostly the one
                with contextlib.suppress(OSError):  # closed meanwhile
                    if os.readlink(f"{folder}/{name}") == wanted:
                        return True
    return False
