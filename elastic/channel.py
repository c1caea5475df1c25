"""The channel between a worker and its agent: messages both ways, and a liveness timestamp.

Messages are JSON objects in packets of a Unix socket pair that the agent made before the worker
began. The liveness timestamp is a file in memory that the worker's Python thread writes ten times a
second: it stops when the process is stopped, or when its interpreter lock is held, and can be read
without the worker's help.
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
    """Send without waiting; False if the other end is gone, or does not read."""
    try:
        channel.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def receive_message(channel: socket.socket) -> dict[str, Any] | None:
    """The next message; None if the other end is gone, or if there is none yet. Does not wait."""
    try:
        packet = channel.recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
    except (ConnectionError, BlockingIOError):
        return None
    return json.loads(packet) if packet else None


class WorkerChannel:
    """A worker's end: a thread refreshes the liveness timestamp and receives messages. Local."""

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
        """Tell the agent something; False if it is gone or does not listen."""
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
