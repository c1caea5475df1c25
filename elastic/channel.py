"""The channel between a worker and its agent: messages in both directions, and liveness.

Messages are JSON objects in packets of a Unix socket pair, which the agent made before it started
the worker. The liveness timestamp is a file in memory. A Python thread of the worker writes it ten
times a second, so it stops when the process is stopped or its interpreter lock is held, and the
agent can read it without the worker's help. `FairClock` says how much of its age counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from holdfast.elastic.generation import parse_identities
from holdfast.elastic.membership_events import event_from_data
from holdfast.parallel.errors import MembershipError, shown
from holdfast.parallel.reading import (
    Count,
    Text,
    decode_json,
    of_kind,
    open_descriptor,
    read_regular,
)

logger = logging.getLogger("holdfast.elastic")

LIVENESS_S = 0.1
_TIMESTAMP = struct.Struct("<q")
_PACKET_BYTES = 1 << 18
"""The largest packet; by default the kernel sends no larger ones."""
_MESSAGES: Mapping[str, Mapping[str, Any]] = {
    "agreeing": {},
    "committed": {"step": Count},
    "cut": {"seconds": Annotated[float, Meta(ge=0, le=1e9)]},
    "event": {"event": dict[str, Any]},
    "examine": {"fully": bool},
    "finished": {},
    "generation": {
        "number": Count,
        "store": Text,
        "prefix": Text,
        "members": str,
        "nodes": list[Text],
    },
    "incurable": {},
    "joining": {},
    "left": {},
    "line": {"text": str},
    "queued": {},
    "sick": {},
    "waiting": {"line": str},
}
"""The kinds of messages and their fields. Agents send "event" and "examine", workers the others and
"event"."""
USUAL_S = 0.5
"""Seconds between two looks of a watcher that runs as it should."""
STARVED_SHARE = 0.75
"""The largest share of the time that a lack of processor time excuses: a busy process that hangs is
found on an overloaded machine too, after four times the limit."""
_KEPT = 1 << 12
"""The number of losses that are remembered; older ones count as if there had been none."""


class LivenessWriter:
    """Writes the liveness timestamp: nanoseconds of `CLOCK_MONOTONIC`, in a small file."""

    def __init__(self, path: Path) -> None:
        descriptor = open_descriptor(path, os.O_RDWR | os.O_CREAT, 0o644, follow=False, own=True)
        try:
            os.posix_fallocate(descriptor, 0, _TIMESTAMP.size)
            self._page = mmap.mmap(descriptor, _TIMESTAMP.size)
        except OSError as error:  # a full disk is told without the name of the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(descriptor)

    def beat(self) -> None:
        _TIMESTAMP.pack_into(self._page, 0, time.monotonic_ns())

    def close(self) -> None:
        self._page.close()


def liveness_s(path: Path) -> float | None:
    """The monotonic time at which a process of this machine last ran Python; None if it never has.

    Local.
    """
    try:
        content = read_regular(path, _TIMESTAMP.size)
    except OSError:
        return None
    if len(content) < _TIMESTAMP.size or not (beat_ns := _TIMESTAMP.unpack_from(content)[0]):
        return None
    return beat_ns / 1e9


def liveness_age_s(path: Path) -> float | None:
    """Seconds since a worker on this machine last ran Python; None if it never has."""
    beat_s = liveness_s(path)
    return None if beat_s is None else time.monotonic() - beat_s


class FairClock:
    """Counts the seconds in which a watcher looked and the watched process could run.

    A watcher that was itself stopped, or did not get a processor, cannot say that another was
    silent meanwhile. Nor is a process hung that waited for a processor.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_s = clock()
        self._losses: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        """The times of looks, and the seconds before each that do not count."""

    def look(self, starved_s: float = 0.0) -> None:
        """Note that the watcher runs now.

        Args:
            starved_s: seconds since the last look in which the process was ready to run and did
                not get a processor.
        """
        now_s = self._clock()
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        late_s = max(0.0, passed_s - USUAL_S)
        lost_s = late_s + min(starved_s, STARVED_SHARE * (passed_s - late_s))
        if lost_s > 0.0:
            self._losses.append((now_s, lost_s))

    def since(self, moment_s: float) -> float:
        """The seconds that count from a time of the clock to the last look.

        What has passed since then says nothing: the watcher may have been stopped meanwhile, or
        have waited for a disk, and only its next look can tell.
        """
        return self._looked_s - moment_s - self.lost_since(moment_s)

    def lost_since(self, moment_s: float) -> float:
        """The seconds since a time of the clock that do not count."""
        lost_s = 0.0
        for at_s, seconds in reversed(self._losses):
            if at_s <= moment_s:
                break
            lost_s += min(seconds, at_s - moment_s)
        return lost_s


def send_message(
    channel: socket.socket, message: dict[str, Any], *, patience_s: float = 0.0
) -> bool:
    """Send a message; False if the other end is gone or does not read.

    Args:
        patience_s: seconds to wait for room in the channel.
    """
    try:
        if patience_s:
            poller = select.poll()
            poller.register(channel, select.POLLOUT)
            poller.poll(1000 * patience_s)
        channel.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def message_in(packet: bytes) -> dict[str, Any]:
    """The message in a packet: its kind is known, and all of its fields are there. Pure.

    Raises:
        MembershipError: it is none.
    """
    try:
        found = decode_json(packet, dict[str, Any])
        for name, kind in _MESSAGES[found["kind"]].items():
            of_kind(found[name], kind)
    except (KeyError, TypeError, ValueError) as error:
        raise MembershipError(f"{shown(packet)} is no message ({shown(error)})") from error
    if found["kind"] == "event":
        event_from_data(found["event"])
    elif found["kind"] == "generation":
        parse_identities(found["members"])
    return found


def receive_message(channel: socket.socket) -> dict[str, Any] | None:
    """The next message; None if the other end is gone or there is no message yet. Does not wait.

    An end that sends something else counts as gone.
    """
    try:
        try:
            packet = channel.recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
        except ConnectionResetError:
            # The other end closed with messages unread. Its own are still there, behind the error.
            packet = channel.recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
    except (ConnectionError, BlockingIOError):
        return None
    try:
        return message_in(packet) if packet else None
    except MembershipError as error:
        logger.error("a channel between an agent and its worker is given up: %s", error)
        return None


class WorkerChannel:
    """A worker's end of the channel; its thread writes the liveness and receives messages.

    Local.
    """

    def __init__(
        self, channel: socket.socket, liveness: Path, receive: Callable[[dict[str, Any]], None]
    ) -> None:
        """Start the thread.

        Args:
            receive: called in that thread with each message; must not block.
        """
        self._channel = channel
        self._receive = receive
        self._liveness = LivenessWriter(liveness)
        self._liveness.beat()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="holdfast-channel", daemon=True)
        self._thread.start()

    def send(self, kind: str, *, patience_s: float = 0.0, **fields: Any) -> bool:
        """Send a message to the agent; False if the agent is gone or does not read.

        Args:
            patience_s: seconds to wait for room in the channel.
        """
        return send_message(self._channel, {"kind": kind, **fields}, patience_s=patience_s)

    def close(self) -> None:
        """End the thread and the channel."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._channel.close()
        self._liveness.close()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        while not self._closing.is_set():
            self._liveness.beat()
            if poller.poll(LIVENESS_S * 1000):
                message = receive_message(self._channel)
                if message is None:
                    return
                self._receive(message)
