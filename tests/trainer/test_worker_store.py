"""The workers of a job meet in a store that only holders of the job's secret use."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from holdfast.parallel.errors import ConfigError, PeerLost
from holdfast.parallel.links import HostedStore, listen, meeting, new_secret
from holdfast.trainer import worker
from holdfast.trainer.worker import connect
from holdfast.trainer.worlds import local_world


def test_a_worker_that_has_another_secret_is_told_how_to_make_one_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "_RETRY_S", 0.0)
    listening = listen("127.0.0.1")
    world = replace(local_world(1, 2, listening.getsockname()[1], new_secret()), job="7")
    with contextlib.closing(HostedStore(listening, world.store_key)):
        store = connect(world)
        store.set("key", "value")
        assert connect(world).get("key") == b"value"
        with pytest.raises(
            ConfigError, match=r"is not rank 0 of this job: .* export HOLDFAST_SECRET="
        ):
            connect(replace(world, secret=new_secret()))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1"])
def test_a_store_that_cannot_be_reached_is_told_in_a_line_and_not_by_torch_s_stack(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], host: str
) -> None:
    monkeypatch.setattr(worker, "STORE_TIMEOUT_S", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = replace(local_world(1, 2, free.getsockname()[1]), store_host=host)
    with pytest.raises(PeerLost, match=r"cannot be used: .*(refused|resol|known).*MASTER_ADDR"):
        connect(world)
    assert capfd.readouterr() == ("", "")


BUSY = """
import ctypes, sys
from dataclasses import replace
from holdfast.trainer.worker import connect
from holdfast.trainer.worlds import local_world

world = local_world(0, 2, int(sys.argv[1]), sys.argv[2])
store = connect(replace(world, store_is_server=True))
sys.stdin.readline()
ctypes.PyDLL(None).sleep(14)  # no other thread runs meanwhile
store.set("done", "")
sys.stdin.readline()
"""


@pytest.mark.mp
def test_a_host_of_the_store_that_lets_no_other_thread_run_keeps_the_other_workers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, secret = free.getsockname()[1], new_secret()
    command = [sys.executable, "-c", BUSY, str(port), secret]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as host:
        assert host.stdin is not None
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert time.monotonic() < deadline, "no host of the store"
                time.sleep(0.05)
            store = connect(local_world(1, 2, port, secret))
            host.stdin.write("go\n")
            host.stdin.flush()
            assert store.get("done") == b""
        finally:
            host.kill()
