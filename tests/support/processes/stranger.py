"""A process that is not of a run and speaks to its ports as one that is; and what a run opens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

NOBODY = 65534
_LISTEN = "0A"
_FORGED = """
import os, socket, sys, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from torchft.coordination import LighthouseClient
second = timedelta(seconds=1)
def tell_store(host, port):
    TCPStore(host, port, wait_for_workers=False, timeout=second).set("a", "9")
def tell_lighthouse(host, port):
    LighthouseClient(f"http://{host}:{port}", second).quorum("x:9", second, data={})
def tell_garbage(host, port):
    lines = [socket.create_connection((host, port), 1) for _ in range(50)]
    for line in lines: line.sendall(os.urandom(100))
    raise ConnectionError("nothing was asked")
def attempt(tell, address):
    host, _, port = address.rpartition(":")
    try:
        tell(host, int(port))
    except Exception:
        return
    print("obeyed at", address, flush=True)
for user in sys.argv[1].split(","):
    if int(user) != os.getuid(): os.setuid(int(user))
    threads = [
        threading.Thread(target=attempt, args=(tell, address), daemon=True)
        for address in sys.argv[2:] for tell in (tell_store, tell_lighthouse, tell_garbage)
    ]
    for thread in threads: thread.start()
    until = time.monotonic() + 4
    for thread in threads: thread.join(max(0.0, until - time.monotonic()))
sys.stdout.flush()
os._exit(0)  # torch waits without limit for a server that says nothing
"""


def obeyed_by(addresses: Iterable[str], before: Sequence[str] = ()) -> str:
    """Tell stores and Lighthouses at each HOST:PORT what only members may; returns who obeyed.

    The stranger is of this process's user, and then, if it may change that, of another one.

    Args:
        before: what starts the stranger's command in another place.
    """
    users = [os.getuid(), NOBODY] if os.getuid() == 0 else [os.getuid()]
    done = subprocess.run(
        [*before, sys.executable, "-c", _FORGED, ",".join(map(str, users)), *addresses],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def listeners(tables: Iterable[str], inodes: set[str] | None = None) -> set[tuple[str, int]]:
    """The addresses and ports that are listened on in the kernel's tables of TCP.

    Args:
        tables: the content of /proc/net/tcp and of /proc/net/tcp6.
        inodes: the sockets that count; None: all.
    """
    found = set()
    for line in "\n".join(tables).splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN and (inodes is None or fields[9] in inodes):
            written, port = fields[1].split(":")
            words = [bytes.fromhex(written[i : i + 8])[::-1] for i in range(0, len(written), 8)]
            family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
            found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def listeners_of(process: int) -> set[tuple[str, int]]:
    """The addresses and ports on which a process of this machine and its descendants listen."""
    inodes = set()
    for pid in _family_of(process):
        try:
            links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:  # it has ended, or closed one
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    return listeners((Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")), inodes)


def _family_of(process: int) -> Iterator[int]:
    yield process
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from _family_of(int(child))
