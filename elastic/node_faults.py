"""Faults of a whole node, for a time: the network is cut off, the disk is full. Local."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from pathlib import Path

from holdfast.parallel.errors import HoldfastError

_RULE = ("priority", "1", "blackhole")
"""The priority after the rule for the machine's own addresses, so its processes reach each
other."""
_SMALLEST_BYTES = 4096


class FaultError(HoldfastError):
    """A fault could not be caused."""


def cut_network(seconds: float) -> None:
    """Drop the packets that this machine (or network namespace) sends; undone after `seconds`.

    Another process undoes it, even if the caller dies.

    Raises:
        FaultError: iproute2 or the right to change the network is missing.
    """
    undo = "; ".join(f"ip {family} rule del {' '.join(_RULE)}" for family in ("-4", "-6"))
    for family in ("-4", "-6"):
        try:
            subprocess.run(
                ["ip", family, "rule", "add", *_RULE], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            if family == "-6":
                break  # a machine without IPv6
            reason = (getattr(error, "stderr", "") or str(error)).strip()
            raise FaultError(
                f"the network cannot be cut off: {reason}; it takes root (CAP_NET_ADMIN) and "
                "iproute2"
            ) from error
    subprocess.Popen(
        ["sh", "-c", f"sleep {seconds:.3f}; {undo}"],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def fill_disk(folder: Path, seconds: float) -> None:
    """Fill a folder's file system for `seconds`, or until this process ends.

    Raises:
        FaultError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (held until the timer closes it)
    except OSError as error:
        raise FaultError(f"{folder} cannot be filled: {error.strerror}") from error
    found = os.statvfs(folder)
    taken, piece = 0, found.f_bfree * found.f_frsize
    while piece >= _SMALLEST_BYTES:
        try:
            os.posix_fallocate(file.fileno(), taken, piece)
            taken += piece
        except OSError:
            piece //= 2
    timer = threading.Timer(seconds, file.close)
    timer.daemon = True
    timer.start()
