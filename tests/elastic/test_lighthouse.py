"""The start waits for the Lighthouse that is named, says so, and ends with the true reason."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from holdfast.elastic.lighthouse import (
    Lighthouse,
    LighthouseAway,
    await_lighthouse,
    lighthouse_key,
)
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.links import new_secret
from holdfast.parallel.output import Waiting
from support.processes.fake_clock import FakeClock


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """A server that sends the same bytes to each client, and then leaves the connection open."""
    lines: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    line, _ = listening.accept()
                except OSError:
                    return
                lines.append(line)
                line.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    for line in lines:
        line.close()


def wait_for(address: str, limit_s: float = 60.0, key: bytes = b"") -> tuple[FakeClock, list[str]]:
    clock, told = FakeClock(), list[str]()
    waiting = Waiting(f"the Lighthouse at {address}", limit_s, tell=told.append, clock=clock)
    try:
        await_lighthouse(address, waiting, key, sleep=clock.sleep)
    except LighthouseAway as error:
        told.append(str(error))
    return clock, told


def test_a_lighthouse_is_not_waited_for() -> None:
    key = lighthouse_key(new_secret())
    lighthouse = Lighthouse("127.0.0.1", key)
    clock, told = wait_for(lighthouse.address, key=key)
    assert (clock.slept_s, told) == ([], [])
    with pytest.raises(ConfigError, match="does not hold the run's secret"):
        wait_for(lighthouse.address, key=lighthouse_key(new_secret()))
    lighthouse.close()


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://no-such-host.invalid:29510"])
def test_an_address_where_no_lighthouse_listens_is_told_after_5_s_and_given_up(
    address: str,
) -> None:
    clock, (told, reason) = wait_for(address, limit_s=8.0)
    assert told.startswith(f"waiting for the Lighthouse at {address} since 5 s (")
    assert reason.startswith(f"the Lighthouse at {address} cannot be reached (")
    assert sum(clock.slept_s) == pytest.approx(8.0, abs=0.3)
    assert LighthouseAway.exit_code == 3


def test_a_server_that_hangs_is_told_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.elastic.lighthouse._CONNECT_S", 0.05)
    for silent in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nha"):
        with server(silent) as address:
            _, (told, reason) = wait_for(address, limit_s=6.0)
            assert "since 5 s (" in told
            # On a busy machine the time is over when the part of a page is read.
            assert "timed out" in reason or (silent and "does not end" in reason)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"\xff\x00\x80\r\n\r\n",
    ],
)
def test_another_program_is_not_taken_for_a_lighthouse(answer: bytes) -> None:
    with server(answer) as address, pytest.raises(ConfigError, match="is no Lighthouse"):
        wait_for(address)
