"""The rendezvous stores where a name server, or the store itself, does not answer."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.parallel.errors import PeerLost
from holdfast.parallel.links import StoreAccess, Tunnels, derived_key, until_answered

SILENT = """
import socket
from holdfast.parallel.links import StoreAccess, Tunnels, derived_key, host_store

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
server.setblocking(False)
key = derived_key("secret", "store")
_, address = host_store("127.0.0.1", key)
store = StoreAccess(Tunnels(), key).connect(address)
store.set("key", "value")
assert store.get("key") == b"value"
try:
    raise SystemExit(f"the name server was asked {server.recv(4096)}")
except BlockingIOError:
    pass
try:
    socket.getnameinfo(("192.0.2.1", 0), 0)
except socket.gaierror:
    pass
assert b"in-addr" in server.recv(4096), "names are not asked for at this name server"
"""
"""It is the name server, and never answers."""


@pytest.mark.mp
def test_a_store_and_its_clients_ask_no_name_server(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    alone = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c"]
    ready = 'ip link set lo up && mount --bind "$0" /etc/resolv.conf || exit 77; exec "$@"'
    done = subprocess.run(
        [*alone, ready, str(tmp_path / "resolv.conf"), sys.executable, "-c", SILENT],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no name server of its own can be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("patience_s", [0.0, 0.3])
def test_a_store_that_is_gone_is_told_in_one_line_and_torch_prints_nothing(
    patience_s: float, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as bound, contextlib.closing(Tunnels()) as tunnels:
        bound.bind(("127.0.0.1", 0))  # and nothing listens
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        access = StoreAccess(tunnels, derived_key("secret", "store"))
        with pytest.raises(
            PeerLost, match=f"^the rendezvous store at {address} does not answer: ."
        ) as told:
            access.connect(address, patience_s=patience_s)
    assert "\n" not in str(told.value)
    assert capfd.readouterr() == ("", "")


def test_a_door_that_is_gone_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "holdfast.links")
    with socket.socket() as bound, contextlib.closing(Tunnels()) as tunnels:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        host, _, port = tunnels.to(address, derived_key("secret", "store")).rpartition(":")
        for _ in range(3):
            with socket.create_connection((host, int(port))) as client:
                assert client.recv(1) == b""
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith(f"no link to {address}: ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (ConnectionRefusedError(111, "Connect call failed ('::1', 1)"), "Connection refused"),
        (EOFError(), "EOFError"),
    ],
)
def test_what_is_waited_for_in_vain_is_told_in_words(error: Exception, said: str) -> None:
    left = iter((1.0, 1.0, 0.0))
    reasons = []

    def left_s(reason: str) -> float:
        reasons.append(reason)
        return next(left)

    def attempt(_: float) -> None:
        raise error

    with pytest.raises(TimeoutError, match=f"^{said}$"):
        until_answered(attempt, left_s, sleep=lambda _: None)
    assert reasons == ["", said, said]
