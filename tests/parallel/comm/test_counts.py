"""Counters that ranks share in the store: each number once, and no wait outlives its generation."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from holdfast.parallel.comm.flight_recorder import FlightRecorder
from holdfast.parallel.comm.gloo import GlooMesh, gloo_device
from holdfast.parallel.comm.protocol import AbortSignal
from holdfast.parallel.errors import PeerLost

pytestmark = [pytest.mark.mp]

HOST = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def host() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with a store, and its port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", HOST, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process, port
    process.kill()
    process.wait()


def mesh_of(port: int, rank: int, signal_: AbortSignal) -> GlooMesh:
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    recorder = FlightRecorder(rank)
    device = gloo_device("127.0.0.1")
    return GlooMesh(store, rank, device=device, timeout_s=60.0, signal=signal_, recorder=recorder)


def test_ranks_count_together_and_each_number_comes_once(
    host: tuple[subprocess.Popen[str], int],
) -> None:
    meshes = [mesh_of(host[1], rank, AbortSignal(3)) for rank in range(3)]
    found: list[int] = []

    def count(mesh: GlooMesh) -> None:
        found.extend(mesh.count("some", 1) for _ in range(50))

    threads = [threading.Thread(target=count, args=(mesh,)) for mesh in meshes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 151))
    assert meshes[0].count("some", 0) == 150
    meshes[0].forget_count("some")
    assert meshes[1].count("some", 0) == 0
    assert mesh_of(host[1], 0, AbortSignal(4)).count("other", 2) == 2


def test_a_store_that_does_not_answer_keeps_no_rank_beyond_its_generation(
    host: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = host
    aborted = AbortSignal(1)
    mesh = mesh_of(port, 0, aborted)
    assert mesh.count("some", 1) == 1
    os.kill(process.pid, signal.SIGSTOP)
    raised: list[BaseException] = []

    def count() -> None:
        try:
            mesh.count("some", 1)
        except PeerLost as error:
            raised.append(error)

    waiting = threading.Thread(target=count)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    aborted.abort("a rank was lost")
    waiting.join(30.0)
    assert "a rank was lost" in str(raised[0])
    with pytest.raises(PeerLost):
        mesh.count("some", 1)
