"""An event loop in a thread of its own, for connections that a process serves beside its work."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

logger = logging.getLogger("holdfast.links")

WAITING = 1024
"""The connections that the kernel keeps until they are accepted."""

_T = TypeVar("_T")
Meet = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LoopThread:
    """A thread that runs an event loop. Local; make it after the last fork."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_tell)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[object, object, _T]) -> _T:
        """Run a coroutine in the loop, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def serve(self, meet: Meet, listening: socket.socket) -> asyncio.Server:
        """Serve each connection to a socket by a task of the loop; the server closes the socket."""
        return self.call(_begin(meet, listening))

    def close(self, servers: Iterable[asyncio.Server] = ()) -> None:
        """End servers of the loop, all of its tasks, and the thread. Call it once."""
        for server in servers:
            self._loop.call_soon_threadsafe(server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks))
            self._loop.close()


async def _begin(meet: Meet, listening: socket.socket) -> asyncio.Server:
    """Serve each connection to a socket by a task of this loop; the server closes the socket.

    A process without free descriptors accepts again after a second. asyncio accepts as many times
    in a row as its backlog, and begins again once for each that failed, so its backlog is 1.
    """
    server = await asyncio.start_server(meet, sock=listening, backlog=1)
    listening.listen(WAITING)
    return server


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that no task has in a line."""
    logger.warning("%s: %s", context["message"], context.get("exception") or "no reason")
