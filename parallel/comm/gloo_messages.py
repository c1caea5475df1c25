"""Messages under way on gloo connections, and the waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from torch import Tensor

from holdfast.parallel.comm.flight_recorder import FlightRecorder
from holdfast.parallel.comm.gloo_waits import InterruptibleWait
from holdfast.parallel.comm.p2p_collectives import lost
from holdfast.parallel.comm.protocol import AbortSignal
from holdfast.parallel.errors import PeerLost


class ConnectionOwner(Protocol):
    """The parts of a rank that its connections need."""

    rank: int
    recorder: FlightRecorder
    signal: AbortSignal
    timeout: timedelta
    closing: list[threading.Thread]
    """Threads that close connections; until one ends, gloo may write to its receive buffers."""

    def connect(self, name: str, peer: int, signal: AbortSignal) -> Any:
        """A process group of this rank and `peer`. Collective over both."""
        ...


class Carrier(Protocol):
    """What messages need of their connection."""

    mesh: ConnectionOwner
    name: str
    peer: int
    open: set[Message]
    """Messages without a known end. They survive an abort: gloo may hold their buffers."""
    is_closed: bool
    """Whether gloo has stopped writing and reading."""

    def wait_until_posted(self, message: Message) -> None:
        """Wait until the connection is ready and the message on its way.

        Raises:
            PeerLost: the connection could not be made.
        """
        ...


class Message:
    """One message under way on a connection; keeps its buffer alive."""

    __slots__ = (
        "connection",
        "error",
        "interruptible",
        "is_send",
        "number",
        "operation",
        "signal",
        "tag",
        "tensor",
        "work",
    )

    def __init__(
        self,
        connection: Carrier,
        tensor: Tensor,
        tag: int,
        operation: str,
        number: int,
        *,
        is_send: bool,
    ) -> None:
        self.connection = connection
        self.tensor = tensor
        self.tag = tag
        self.operation = operation
        self.is_send = is_send
        self.number = number
        self.signal = connection.mesh.signal
        self.work: Any = None
        self.interruptible: InterruptibleWait | None = None
        """The wait for the message, once it has begun."""
        self.error: BaseException | None = None

    def wait(self) -> None:
        wait_for((self,))

    def lost(self, error: BaseException) -> PeerLost:
        """What its waiter is told of a failure."""
        self.signal.check()
        if isinstance(error, PeerLost):
            return error
        return lost(self.operation, self.connection.name, self.connection.peer, error)


def wait_for(messages: Sequence[Message]) -> None:
    """Wait for messages of one rank, in turn.

    Raises:
        PeerLost: a peer is gone, or the generation was aborted.
    """
    if not messages:
        return
    at, recorder = messages[0], messages[0].connection.mesh.recorder
    since = time.monotonic()
    waited: InterruptibleWait | None = None
    try:
        at.signal.check()
        for at in messages:
            if at.work is None:
                recorder.waiting(at.number)
                at.connection.wait_until_posted(at)
                recorder.waits_no_more(at.number)  # but perhaps for the next one's connection
        waited = _begin_to_wait(messages, recorder)
        waited.wait()
    except (RuntimeError, PeerLost) as error:
        if waited is not None:
            left = [*_end(messages, waited.done), at]  # that thread may just have ended the last
            at = next((message for message in left if message.connection.is_closed), left[0])
        recorder.finished(at.number, failed=True, since=since)
        raise at.lost(error) from error
    recorder.waited(since)
    _end(messages, len(messages))


def _end(messages: Sequence[Message], done: int) -> Sequence[Message]:
    """Forget messages that are done, whose connections are idle again. Returns the others."""
    for message in messages[:done]:
        message.connection.open.discard(message)
    return messages[done:]


def _begin_to_wait(messages: Sequence[Message], recorder: FlightRecorder) -> InterruptibleWait:
    # It must not refer to the messages, which refer to it: their memory would stay for long.
    numbers = [message.number for message in messages]
    wait = InterruptibleWait(
        [message.work for message in messages],
        messages[0].connection.mesh.timeout,
        lambda place: recorder.waiting(numbers[place]),
        lambda place: recorder.finished(numbers[place]),
    )
    for message in messages:
        message.interruptible = wait
    # Read after the lines above: the thread that closes a connection sets `is_closed` first and
    # then looks for waits.
    if any(message.connection.is_closed for message in messages):
        wait.cancel()
    return wait


@dataclass(slots=True)
class Messages:
    """Some messages, as one operation."""

    messages: Sequence[Message]

    def wait(self) -> None:
        wait_for(self.messages)
