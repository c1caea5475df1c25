"""The file in which the acceptor state of a worker outlives its process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from holdfast.elastic.agreement.reports import (
    AcceptorState,
    acceptor_from_data,
    acceptor_to_data,
)
from holdfast.elastic.generation import Identity
from holdfast.parallel.errors import MembershipError
from holdfast.parallel.files import open_lock
from holdfast.parallel.output import write_whole
from holdfast.parallel.reading import parse_json, read_regular

_ATTEMPTS = 200
_PAUSE_S = 0.1
_MOST_BYTES = 1 << 24


class AcceptorFile:
    """The acceptor state of one worker in its node's memory or disk: written before it is acted on.

    The process that reports as the worker holds a lock on it: the worker while it lives, afterwards
    the agent that reports on its behalf. The lock ends with the process, however that ends. Forked
    children do not inherit it.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        """Only set the paths; nothing is opened.

        Args:
            folder: a folder on the worker's node that its agent sees; it need not survive the node.
        """
        self._path = folder / f"{identity}.acceptor"
        self._lock_path = folder / f"{identity}.lock"

    @contextlib.contextmanager
    def held(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the right to report as this worker.

        Args:
            wait: wait until another process gives the right up.
        Raises:
            BlockingIOError: another process has the right, and `wait` is false.
        """
        with os.fdopen(open_lock(self._lock_path), "r+") as file:
            _lock(file, wait=wait)
            yield

    def read(self) -> AcceptorState:
        """The state last written; without one, that of a worker that knows nothing.

        Raises:
            MembershipError: the file cannot be read, or has been damaged.
        """
        try:
            return acceptor_from_data(parse_json(read_regular(self._path, _MOST_BYTES)))
        except FileNotFoundError:
            return AcceptorState()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MembershipError(
                f"{self._path} does not tell what this worker has agreed to: {reason}"
            ) from error

    def write(
        self, acceptor: AcceptorState, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Replace the state. The process may be killed at any instant; the node may not.

        It waits for a disk without room: an answer that comes late harms less than a worker lost.

        Raises:
            OSError: the disk has refused it for too long.
        """
        content = json.dumps(acceptor_to_data(acceptor)).encode()
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(OSError):
                return write_whole(self._path, content)
            sleep(_PAUSE_S)
        return write_whole(self._path, content)


def _lock(file: IO[str], *, wait: bool) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
