"""torchft's Lighthouse: the server in this process, heartbeats, rounds and ages of workers.

torchft 0.2.0 was measured and read for two facts used here. `ManagerServer` sends its heartbeats
from a native thread that needs no interpreter lock (the oldest age was 0.10 s at an interval of
0.10 s while a worker held the lock for 2 s), and it reconnects when the Lighthouse is back. A
restarted Lighthouse counts from 0 and knows no worker, so its counter does not serve as a
generation.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from holdfast.elastic.generation import Identity, parse_identity
from holdfast.parallel.errors import ConfigError, MembershipError, PeerLost, first_line
from holdfast.parallel.links import (
    Door,
    PrivateServer,
    StrangerError,
    Tunnels,
    close_to_all,
    derived_key,
    knock,
    listen,
    to_server,
)
from holdfast.parallel.output import Waiting

GUARDED = "holdfast://"
"""The URL of a Lighthouse behind a door begins with it."""
JOIN_TIMEOUT_MS = 100
"""Milliseconds that a round waits for workers that are alive and do not take part."""
_TICK_MS = 10
_CONNECT_S = 1.0
_ANSWER_S = 0.2
_PAUSE_S = 0.2
_PAGE_BYTES = 1 << 24
_IS_ONE = "Next quorum status"
"""The text by which a Lighthouse's status page is known."""
_SEEN = re.compile(r"^\s*([\w.-]+):(\d+(?:\.\d+)?): seen ([\d.e-]+)s ago", re.MULTILINE)


def coordination() -> Any:
    """torchft's coordination module, set to log warnings only and to use one thread per client."""
    os.environ.setdefault("RUST_LOG", "warn")
    os.environ.setdefault("TOKIO_WORKER_THREADS", "1")
    import torchft.coordination

    return torchft.coordination


class LighthouseAway(MembershipError):
    """The Lighthouse cannot be reached; changes of membership wait until it can."""


class RoundTimeout(MembershipError):
    """No round came in time; a Lighthouse, if there is one, waits for others to take part."""


class Lighthouse:
    """A Lighthouse in this process, behind a door. Local; make it after the last fork."""

    def __init__(
        self,
        host: str,
        key: bytes,
        port: int = 0,
        *,
        heartbeat_timeout_ms: int = 3000,
        on_stranger: Callable[[str], None] | None = None,
    ) -> None:
        """Start the server.

        Args:
            host: the address to listen on, as agents reach it.
            key: the key of its door.
            port: the port; 0: a free one.
            heartbeat_timeout_ms: the silence after which a worker counts as gone.
            on_stranger: called once, in another thread, with a sentence about the first connection
                of a stranger.
        Raises:
            MembershipError: the address cannot be listened on.
        """
        try:
            listening = listen(host, port)
            self._server = coordination().LighthouseServer(
                bind="127.0.0.1:0",
                min_replicas=1,
                join_timeout_ms=JOIN_TIMEOUT_MS,
                quorum_tick_ms=_TICK_MS,
                heartbeat_timeout_ms=heartbeat_timeout_ms,
            )
        except (OSError, RuntimeError) as error:
            raise MembershipError(
                f"no Lighthouse can listen on {host}:{port}: {error}; free the port or name another"
            ) from error
        self._private = PrivateServer.at(int(self._server.address().rsplit(":", 1)[1]))
        self.address = f"{GUARDED}{host}:{listening.getsockname()[1]}"
        """The URL for agents."""
        self._door = Door(listening, key, to_server(self._private.connect), on_stranger=on_stranger)

    def close(self) -> None:
        """End the server and its connections."""
        self._door.close()
        self._private.close()
        self._server.shutdown()


def reached_by(address: str, tunnels: Tunnels, key: bytes) -> str:
    """The URL by which clients that know no keys reach a Lighthouse: through its door, if any."""
    if not address.startswith(GUARDED):
        return address
    return f"http://{tunnels.to(address.removeprefix(GUARDED), key)}"


def lighthouse_url(address: str) -> str:
    """`elastic.lighthouse` as a URL; HOST:PORT may be given without http://."""
    return (address if "://" in address else f"http://{address}").rstrip("/")


def replica_id(run: str, identity: Identity) -> str:
    """The name of a worker at a Lighthouse, which keeps runs apart that share it by mistake."""
    return f"{run}:{identity}"


def identity_of(replica: str, run: str) -> Identity | None:
    """The worker of `run` with a name; None if the name is of another run."""
    name, _, identity = replica.partition(":")
    return parse_identity(identity) if name == run else None


class Heartbeats:
    """The heartbeats of this process to a Lighthouse, whatever its interpreter does. Local."""

    def __init__(self, address: str, replica: str, interval_ms: int) -> None:
        """Begin the heartbeats.

        Raises:
            LighthouseAway: the Lighthouse cannot be reached now.
        """
        try:
            self._server = coordination().ManagerServer(
                replica_id=replica,
                lighthouse_addr=address,
                hostname="127.0.0.1",
                bind="127.0.0.1:0",
                store_addr="",
                world_size=1,
                heartbeat_interval=timedelta(milliseconds=interval_ms),
                connect_timeout=timedelta(seconds=_CONNECT_S),
                quorum_retries=0,
            )
        except (RuntimeError, TimeoutError) as error:
            raise _away(address, error) from error
        try:  # torchft's server obeys whatever connects, and ends this process when told to
            close_to_all(int(self._server.address().rsplit(":", 1)[1]))
        except PeerLost as error:
            self.close()
            raise _away(address, error) from error

    def close(self) -> None:
        self._server.shutdown()


class RoundClient:
    """Takes part in rounds of a Lighthouse. It connects at first use, and again when needed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: Any = None

    def round(
        self, replica: str, report: dict[str, Any], timeout_s: float
    ) -> Sequence[tuple[str, dict[str, Any]]]:
        """Take part in the next round. Returns the name and report of each participant.

        Releases the interpreter's lock.

        Raises:
            LighthouseAway: the Lighthouse cannot be reached.
            RoundTimeout: no round came in time.
        """
        try:
            if self._client is None:
                connect = timedelta(seconds=min(_CONNECT_S, timeout_s))
                self._client = coordination().LighthouseClient(self._address, connect)
            quorum = self._client.quorum(replica, timedelta(seconds=timeout_s), data=report)
        except TimeoutError as error:
            raise RoundTimeout(f"no round within {timeout_s:.1f} s at {self._address}") from error
        except RuntimeError as error:
            raise _away(self._address, error) from error
        return [(member.replica_id, member.data or {}) for member in quorum.participants]


def _away(address: str, error: Exception) -> LighthouseAway:
    reason = str(error).splitlines()[0][:160]
    return LighthouseAway(
        f"the Lighthouse at {address} cannot be reached ({reason}); start it again at that "
        "address, or check the network"
    )


class StatusPage:
    """The status page of a Lighthouse, read over one connection that is kept.

    For one thread at a time. A new connection through a tunnel costs seven times as much as a
    question on one that is there.
    """

    def __init__(self, address: str) -> None:
        """Nothing is connected yet.

        Args:
            address: the URL of the Lighthouse.
        """
        self._address = address
        # Environment variables name proxies for other servers, not for one that nodes share.
        self._line = http.client.HTTPConnection(urlsplit(address).netloc)

    def ages(self, run: str, timeout_s: float = 1.0) -> dict[Identity, float]:
        """Seconds since the Lighthouse last heard of each worker of a run; it forgets none.

        Raises:
            LighthouseAway: the Lighthouse cannot be reached.
        """
        try:
            return ages_in(self.text(timeout_s), run)
        except (OSError, http.client.HTTPException) as error:
            raise _away(self._address, error) from error

    def text(self, timeout_s: float) -> str:
        """The page. Waits this long at most for each part of it, and twice as long for all.

        Raises:
            OSError, HTTPException: there is none.
        """
        is_kept = self._line.sock is not None
        try:
            return self._read(timeout_s)
        except ConnectionError:
            if not is_kept:
                raise
        return self._read(timeout_s)  # a Lighthouse that was restarted since has ended the line

    def close(self) -> None:
        self._line.close()

    def _read(self, timeout_s: float) -> str:
        deadline_s = time.monotonic() + timeout_s
        page = bytearray()
        try:
            self._line.timeout = timeout_s
            if self._line.sock is not None:
                self._line.sock.settimeout(timeout_s)
            self._line.request("GET", "/status")
            answer = self._line.getresponse()
            if answer.status != http.HTTPStatus.OK:
                raise http.client.HTTPException(f"HTTP Error {answer.status}: {answer.reason}")
            while part := answer.read1(_PAGE_BYTES):
                page += part
                if time.monotonic() > deadline_s or len(page) > _PAGE_BYTES:
                    raise TimeoutError("its status page does not end")
            answer.close()  # the connection takes the next question then
        except BaseException:
            self.close()
            raise
        return page.decode(errors="replace")


def answers(address: str) -> bool:
    """Whether a Lighthouse answers now. Waits 0.2 s at most for each part of the answer."""
    try:
        _status(address, _ANSWER_S)
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def heartbeat_ages(address: str, run: str, timeout_s: float = 1.0) -> dict[Identity, float]:
    """See `StatusPage.ages`; for one look alone."""
    with contextlib.closing(StatusPage(address)) as page:
        return page.ages(run, timeout_s)


def ages_in(page: str, run: str) -> dict[Identity, float]:
    """The ages of heartbeats on a status page, by worker of a run. Pure."""
    ages: dict[Identity, float] = {}
    for name, identity, age in _SEEN.findall(page):
        if name == run:
            with contextlib.suppress(ValueError, MembershipError):
                ages[parse_identity(identity)] = float(age)
    return ages


def lighthouse_key(secret: str) -> bytes:
    """The key to the door of a Lighthouse, which runs with the same secret may share."""
    return derived_key(secret, "lighthouse")


def await_lighthouse(
    address: str,
    waiting: Waiting,
    key: bytes = b"",
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until a Lighthouse answers at an address.

    Args:
        key: the key of its door, if it has one.
    Raises:
        ConfigError: another program answers there, or one that does not hold the key.
        LighthouseAway: none answers in time.
    """
    reason = ""
    while waiting.left_s(reason) > 0:
        try:
            if address.startswith(GUARDED):
                return knock(address.removeprefix(GUARDED), key, _CONNECT_S)
            if _IS_ONE in _status(address, _CONNECT_S):
                return
            found = "its status page is another's"
        except StrangerError as error:
            raise ConfigError(f"elastic.lighthouse: what answers at {address}: {error}") from error
        except http.client.HTTPException as error:
            found = first_line(error)
        except (OSError, EOFError) as error:
            reason = str(error)
            sleep(_PAUSE_S)
            continue
        raise ConfigError(
            f"elastic.lighthouse: what answers at {address} is no Lighthouse ({found}); give "
            "HOST:PORT of torchft_lighthouse, or leave the key empty"
        )
    raise _away(address, OSError(reason or "no answer in time"))


def _status(address: str, timeout_s: float) -> str:
    """See `StatusPage.text`; for one look alone."""
    with contextlib.closing(StatusPage(address)) as page:
        return page.text(timeout_s)
