"""A stranger at a run's ports gets nowhere, and costs the run nothing."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from holdfast.parallel.links import (
    StoreAccess,
    Tunnels,
    derived_key,
    host_store,
    private_server,
)
from holdfast.parallel.links.link import MOST_BYTES, Sealer
from support.processes.forked_command import ForkedCommand
from support.processes.stranger import listeners_of, obeyed_by
from support.runs.commands import CONFIG, HOLDFAST, environment, lines_of
from support.runs.elastic_demo import wait_for
from support.runs.elastic_runs import Process

KEY = derived_key("a secret of this test", "store")
STEPS = 60


@contextmanager
def hosted(told: list[str]) -> Iterator[str]:
    store, address = host_store("127.0.0.1", KEY, told.append)
    with closing(store):
        yield address


def serves(address: str) -> bool:
    with closing(Tunnels()) as tunnels:
        store = StoreAccess(tunnels, KEY).connect(address)
        store.set("key", "value")
        return store.get("key") == b"value"


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"holdfast link 1\n" + b"x" * 64],
    ids=["nothing", "http", "garbage", "a greeting without proof"],
)
def test_a_store_serves_its_clients_whatever_300_strangers_say(said: bytes) -> None:
    told: list[str] = []
    with hosted(told) as address:
        host, _, port = address.partition(":")
        lines = [socket.create_connection((host, int(port))) for _ in range(300)]
        for line in lines:
            line.sendall(said)
        assert serves(address)
        assert len(told) == bool(told)  # once
        for line in lines:
            line.close()


def test_where_the_kernel_signs_no_segments_stores_serve_all_the_same_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(private_server, "_TCP_MD5SIG_EXT", 9999)
    with hosted([]) as address:
        assert serves(address)
    assert "any user of this machine can connect to 127.0.0.1:" in caplog.text


WITHOUT_DESCRIPTORS = """
import logging, resource, socket, sys, time
from contextlib import closing
from holdfast.parallel.links import derived_key, host_store, StoreAccess, Tunnels
told = []
logging.getLogger().addHandler(handler := logging.Handler())
handler.emit = lambda record: told.append(record.getMessage())
key = derived_key("a secret", "store")
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
store, address = host_store("127.0.0.1", key)
host, _, port = address.partition(":")
lines = []
with closing(store), closing(Tunnels()) as tunnels:
    try:
        while True:
            lines.append(socket.socket())
    except OSError:
        pass
    assert len(lines) > 10, len(lines)
    for line in lines:
        line.connect((host, int(port)))
    time.sleep(2.5)
    for line in lines:
        line.close()
    time.sleep(1.5)
    client = StoreAccess(tunnels, key).connect(address)
    client.set("key", "value")
    assert client.get("key") == b"value"
assert 1 <= len(told) < 12, told
"""


@pytest.mark.mp
def test_a_door_without_descriptors_says_so_each_second_and_serves_once_it_has_some(
    tmp_path: Path,
) -> None:
    (tmp_path / "program.py").write_text(WITHOUT_DESCRIPTORS)
    output, errors = tmp_path / "printed.txt", tmp_path / "errors.txt"
    program = {"script": tmp_path / "program.py", "errors": errors}
    done = ForkedCommand([], output, environment(TORCH_CPP_LOG_LEVEL="ERROR"), **program)
    assert done.wait(60) == 0, errors.read_text()[-2000:]
    assert errors.read_text() == ""


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_only_its_own_process_connects_to_a_private_server(source: str) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()
    with closing(private_server.PrivateServer(listening.dup())) as server, listening:
        with socket.socket() as stranger:
            stranger.bind((source, 0))
            stranger.settimeout(0.3)
            with pytest.raises(TimeoutError):
                stranger.connect(address)
        with server.connect() as own, listening.accept()[0] as accepted:
            own.sendall(b"said")
            assert accepted.recv(4) == b"said"


def test_a_record_that_is_altered_repeated_or_left_out_has_a_wrong_proof() -> None:
    sent, received = Sealer(KEY), Sealer(KEY)
    first = sent.tag(b"one")
    assert received.tag(b"one") == first
    assert received.tag(b"one") != first  # repeated
    assert Sealer(KEY).tag(b"two") != first
    assert Sealer(derived_key("another", "store")).tag(b"one") != first
    assert MOST_BYTES == 1 << 16


def without_rights() -> list[str]:
    """What starts a command that has no more rights than an ordinary user, where this user has."""
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.getuid() == 0 else []


@contextmanager
def training(folder: Path, steps: int, more: str, before: Sequence[str] = ()) -> Iterator[Process]:
    """A run that has begun its steps."""
    layout = CONFIG.replace("steps = 6", f"steps = {steps}").replace("pipeline = 2", "pipeline = 1")
    layout = layout.replace("global_batch = 8", "global_batch = 2")
    (folder / "run.toml").write_text(layout + more)
    arguments = ["train", "run.toml", "--out", "run"]
    run: Process
    if before:
        command = [*before, *HOLDFAST, *arguments]
        run = subprocess.Popen(command, cwd=folder, env=environment(), text=True)
    else:
        run = ForkedCommand(arguments, folder / "run.txt", environment(), folder=folder)
    try:
        metrics = folder / "run/metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(lines_of(metrics)) > 2, "the first steps")
        yield run
    finally:
        run.kill()
        run.wait()


@pytest.mark.mp
def test_a_run_without_rights_listens_on_the_loopback_alone_and_obeys_no_other_process(
    tmp_path: Path,
) -> None:
    slow = 'chaos = [{fault = "slow", rank = 0, step = 1, seconds = 0.15}]\n'  # meanwhile it runs
    more = f"[elastic]\nenabled = true\nlocal_nodes = 2\n{slow}"
    with training(tmp_path, STEPS, more, without_rights()) as run:
        found = listeners_of(run.pid)
        assert len(found) >= 8  # two stores and the Lighthouse, their doors, and tunnels
        assert {host for host, _ in found} == {"127.0.0.1"}
        assert obeyed_by(f"{host}:{port}" for host, port in sorted(found)) == ""
        assert run.wait(120) == 0
    assert [line["step"] for line in lines_of(tmp_path / "run/metrics.jsonl")] == [
        *range(1, STEPS + 1)
    ]
    names = [line["event"] for line in lines_of(tmp_path / "run/events.jsonl")]
    assert "rank_lost" not in names


@pytest.mark.mp
def test_a_run_without_agents_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    with training(tmp_path, 100_000, "") as run:
        found = listeners_of(run.pid)
        assert len(found) >= 2
        assert {host for host, _ in found} == {"127.0.0.1"}
