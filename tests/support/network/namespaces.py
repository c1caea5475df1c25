"""Network namespaces of Linux, as processes enter them."""

from __future__ import annotations

import ctypes
import os

_CLONE_NEWNET = 0x40000000


def enter_network(name: str) -> None:
    """Move this thread, and the processes that it starts, to a network namespace."""
    descriptor = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)
