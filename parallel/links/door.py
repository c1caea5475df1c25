"""A door: a port behind which only processes get that hold a key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

from holdfast.parallel.links.link import ANY_BEATS, Link, StrangerError, greeted, splice
from holdfast.parallel.links.loop_thread import WAITING, LoopThread

logger = logging.getLogger("holdfast.links")

_MOST_GREETING = 256
"""The connections that may be without a proof at a time. One more ends the oldest of them: those of
the run prove themselves within milliseconds."""
_T = TypeVar("_T")
Serve = Callable[[Link], Awaitable[None]]


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens on an address of this machine; an empty one: on all of them.

    Connections that it accepts send each write at once. Otherwise the second of two small writes
    waits 40 ms for the other end's acknowledgement.

    Raises:
        OSError: the address is not of this machine, or the port is taken.
    """
    if not host and socket.has_dualstack_ipv6():
        everywhere, six = ("", port), socket.AF_INET6
        made = socket.create_server(everywhere, family=six, dualstack_ipv6=True, backlog=WAITING)
    else:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=WAITING)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


class Door:
    """Listens for links and serves each; drops and counts what does not hold the key.

    Local; make it after the last fork.
    """

    def __init__(
        self,
        listening: socket.socket,
        key: bytes,
        serve: Serve,
        *,
        on_stranger: Callable[[str], None] | None = None,
    ) -> None:
        """Open the door.

        Args:
            listening: the result of `listen`; the door closes it.
            serve: serves one link, in the thread of the door.
            on_stranger: called there with a sentence about the first stranger.
        """
        self._key, self._serve, self._on_stranger = key, serve, on_stranger
        self._where = "{}:{}".format(*listening.getsockname()[:2])
        self._listening = listening.dup()
        self._greeting: dict[asyncio.StreamWriter, None] = {}
        self.strangers = 0
        """The connections that were dropped so far."""
        allow_descriptors()
        self._thread = LoopThread("holdfast-door")
        self._server = self._thread.serve(self._meet, listening)

    def call(self, coroutine: Coroutine[object, object, _T]) -> _T:
        """Run a coroutine in the thread of the door, and wait for its result."""
        return self._thread.call(coroutine)

    def close(self) -> None:
        """Close the door and all links; returns when they are.

        The port is free then, also if processes were forked while it was listened on.
        """
        if self.strangers:
            logger.warning("%d connections of strangers to %s", self.strangers, self._where)
        self._thread.close([self._server])
        with self._listening, contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("peername") or ("an unknown address",)
        self._greeting[writer] = None
        if len(self._greeting) > _MOST_GREETING:
            oldest = next(iter(self._greeting))
            del self._greeting[oldest]
            oldest.transport.abort()
        try:
            try:
                link = await greeted(reader, writer, self._key)
            finally:
                self._greeting.pop(writer, None)
            await self._serve(link)
        except (StrangerError, TimeoutError) as error:
            self._count(str(address[0]), str(error) or "it said nothing")
        except (OSError, EOFError) as error:
            logger.info("a link from %s has ended: %s", address[0], error)
        except asyncio.CancelledError:
            pass  # the door closes
        finally:
            with contextlib.suppress(OSError):
                writer.close()

    def _count(self, address: str, reason: str) -> None:
        self.strangers += 1
        if self.strangers == 1:
            told = f"a connection from {address} to {self._where} was dropped: {reason}"
            logger.warning("%s", told)
            if self._on_stranger is not None:
                self._on_stranger(told)


def to_server(connect: Callable[[], socket.socket]) -> Serve:
    """Serve a link by a connection of its own to a server in this process.

    No silence ends it: the process at its other end may be stopped, or in a call that lets no other
    thread run, and goes on to use it. The kernel ends a link to a machine that is gone.

    Args:
        connect: makes the connection.
    """

    async def serve(link: Link) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=connect())
        except OSError as error:
            logger.warning("a server behind a door does not answer: %s", error)
            link.close()
            return
        await splice(link, reader, writer, ANY_BEATS)

    return serve


def allow_descriptors() -> int:
    """Raise the limit of open descriptors as far as this process may; returns it.

    A link takes three.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return found if found != resource.RLIM_INFINITY else sys.maxsize
