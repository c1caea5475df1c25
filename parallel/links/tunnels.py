"""Tunnels from loopback addresses of this machine to doors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection
from functools import partial

from holdfast.parallel.errors import first_line
from holdfast.parallel.links.door import listen
from holdfast.parallel.links.link import SILENT_BEATS, greet, splice
from holdfast.parallel.links.loop_thread import LoopThread
from holdfast.parallel.links.tcp_table import LOOPBACK, connection, is_open_in

logger = logging.getLogger("holdfast.links")

_CONNECT_S = 2.0
_KNOWN_S = 1.0
"""Seconds within which a process that connects must have become one that may."""
_LOOK_S = 0.05
_MOST_UNKNOWN = 256


def _this_process() -> Collection[int]:
    return (os.getpid(),)


class Tunnels:
    """The tunnels of one process: a loopback address for each door. Local.

    A client that knows no keys connects to the loopback address, and so to the server behind the
    door. Any user of the machine could connect too, so the kernel is asked which process has.
    """

    def __init__(
        self,
        trusted: Callable[[], Collection[int]] = _this_process,
        silent_beats: int = SILENT_BEATS,
    ) -> None:
        """Make no tunnel yet.

        Args:
            trusted: returns the processes of this user that may use the tunnels.
            silent_beats: see `splice`.
        """
        self._trusted, self._silent_beats = trusted, silent_beats
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._made: dict[tuple[str, bytes], tuple[str, asyncio.Server]] = {}
        self._unknown = 0
        self._away: set[str] = set()
        """The doors that did not answer the last time; told once."""
        self.strangers = 0
        """The connections that were dropped so far."""

    def to(self, address: str, key: bytes) -> str:
        """The loopback address, HOST:PORT, that leads to the door at HOST:PORT.

        Whether the door answers shows at the first use.

        Args:
            key: the door's.
        """
        with self._lock:
            if (address, key) not in self._made:
                self._thread = self._thread or LoopThread("holdfast-tunnels")
                listening = listen(LOOPBACK)
                where = "{}:{}".format(*listening.getsockname())
                meet = partial(self._meet, address, key)
                self._made[address, key] = (where, self._thread.serve(meet, listening))
            return self._made[address, key][0]

    def close(self) -> None:
        """End all tunnels."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.close([server for _, server in self._made.values()])
            self._made.clear()

    async def _meet(
        self, address: str, key: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.closing(writer):
            try:
                if await self._may_pass(writer):
                    await self._pass(address, key, reader, writer)
            except (OSError, EOFError) as error:
                if address not in self._away:
                    logger.info("no link to %s: %s", address, first_line(error))
                self._away.add(address)
            except asyncio.CancelledError:
                pass  # the tunnel closes

    async def _may_pass(self, writer: asyncio.StreamWriter) -> bool:
        """Whether the process that has connected is trusted.

        A process that has just begun may not be known as such yet, so this waits for a moment,
        unless many others are waited for.
        """
        own, other = writer.get_extra_info("sockname"), writer.get_extra_info("peername")
        self._unknown += 1
        try:
            for _ in range(int(_KNOWN_S / _LOOK_S)):
                end = connection(other[1], own[1]) if other[0] == LOOPBACK else None
                if end is None or not end.inode:  # it has left
                    break
                if is_open_in(end.inode, self._trusted()):
                    return True
                if self._unknown > _MOST_UNKNOWN:
                    break
                await asyncio.sleep(_LOOK_S)
        finally:
            self._unknown -= 1
        self.strangers += 1
        if self.strangers == 1:
            logger.warning("a process that is not of this run connected to %s:%d", *own[:2])
        return False

    async def _pass(
        self, address: str, key: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        host, _, port = address.rpartition(":")
        async with asyncio.timeout(_CONNECT_S):
            far = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            link = await greet(*far, key)
            self._away.discard(address)
            await splice(link, reader, writer, self._silent_beats)
        finally:
            far[1].close()
