"""A thread that asks no name server for the names of addresses.

torch asks for the name of each address that a client of a store connects to, because it could be
logged. The answer is never used, and a name server that is away costs 10 s or more.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_IS_READ = 1
"""RES_INIT: /etc/resolv.conf is read."""


class _Resolver(ctypes.Structure):
    """The first fields of glibc's `struct __res_state`; each thread has one of its own."""

    _fields_ = (
        ("retrans", ctypes.c_int),
        ("retry", ctypes.c_int),
        ("options", ctypes.c_ulong),
        ("nscount", ctypes.c_int),
    )


@contextlib.contextmanager
def no_name_server() -> Iterator[None]:
    """Let this thread ask no name server during the block; /etc/hosts is still read."""
    library = ctypes.CDLL(None)
    try:
        of_thread, prepare = library["__res_state"], library["__res_init"]
    except AttributeError:  # another C library than glibc
        yield
        return
    of_thread.restype = ctypes.POINTER(_Resolver)
    resolver = of_thread().contents
    if not resolver.options & _IS_READ:
        prepare()
    servers, resolver.nscount = resolver.nscount, 0
    try:
        yield
    finally:
        resolver.nscount = servers
