"""The channel between a worker and its agent: messages in both directions, and liveness.

Messages are JSON objects in packets of a Unix socket pair, which the agent made before it started
the worker. The liveness timestamp is a file in memory. A Python thread of the worker writes it ten
times a second, so it stops when the process is stopped or its interpreter lock is held, and the
agent can read it without the worker's help.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIVENESS_S = 0.1
_TIMESTAMP = struct.Struct("<q")
_PACKET_BYTES = 1 << 16


class LivenessWriter:
    """Writes the liveness timestamp: nanoseconds of `CLOCK_MONOTONIC`, in a small file."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, _TIMESTAMP.size)
            self._page = mmap.mmap(descriptor, _TIMESTAMP.size)
        finally:
            os.close(descriptor)

    def beat(self) -> None:
        _TIMESTAMP.pack_into(self._page, 0, time.monotonic_ns())

    def close(self) -> None:
        self._page.close()


def liveness_age_s(path: Path) -> float | None:
    """Seconds since a worker on this machine last ran Python; None if it never has."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _TIMESTAMP.size or not (beat_ns := _TIMESTAMP.unpack_from(content)[0]):
        return None
    return (time.monotonic_ns() - beat_ns) / 1e9


def send_message(channel: socket.socket, message: dict[str, Any]) -> bool:
    """Send a message without waiting; False if the other end is gone or does not read."""
    try:
        channel.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def receive_message(channel: socket.socket) -> dict[str, Any] | None:
    """The next message; None if the other end is gone or there is no message yet. Does not wait."""
    try:
        packet = channel.recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
    except (ConnectionError, BlockingIOError):
        return None
    return json.loads(packet) if packet else None


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

    def send(self, kind: str, **fields: Any) -> bool:
        """Send a message to the agent; False if the agent is gone or does not read."""
        return send_message(self._channel, {"kind": kind, **fields})

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
