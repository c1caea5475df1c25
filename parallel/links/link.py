"""The protocol of links: both ends prove that they hold the key; each record carries a proof too.

First the client sends a greeting and a nonce. The server answers with its own nonce and an
HMAC-SHA256 over both, and the client with another. After that both ends send records: length (4
bytes), payload, and an HMAC-SHA256 over the record's number, its length and its payload, cut to 16
bytes, under a key for this connection and direction. So no record can be forged, altered, repeated
or left out. Nothing is encrypted.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import struct
import sys

GREETING_S = 5.0
"""Seconds that a peer may take to prove that it holds the key."""
MOST_BYTES = 1 << 16
"""The payload of a record, at most."""
BEAT_S = 1.0
SILENT_BEATS = 12
"""The seconds without a record, each counted while this process ran, that end a link. A process
that is stopped for some seconds and goes on keeps its links."""
ANY_BEATS = sys.maxsize
"""For links that no silence ends."""
_GREETING = b"holdfast link 1\n"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_TAG_BYTES = 16
_LENGTH = struct.Struct(">I")
_NUMBERED = struct.Struct(">QI")


class StrangerError(ConnectionError):
    """The peer does not hold the key, or what came from it was altered on the way."""


class Sealer:
    """The proofs of one direction of a connection, in the order of its records. Pure."""

    def __init__(self, key: bytes) -> None:
        self._key, self._number = key, 0

    def tag(self, payload: bytes) -> bytes:
        """The proof of the next record."""
        numbered = _NUMBERED.pack(self._number, len(payload))
        self._number += 1
        return hmac.digest(self._key, numbered + payload, "sha256")[:_TAG_BYTES]


class Link:
    """One end of an authenticated connection."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        keys: tuple[bytes, bytes],
    ) -> None:
        """Go on after the greeting.

        Args:
            keys: for what is sent, and for what is received.
        """
        self._reader, self._writer = reader, writer
        self._sent, self._received = Sealer(keys[0]), Sealer(keys[1])
        self.quiet_beats = 0
        """The beats since the last record came; `keep` counts them."""

    async def send(self, payload: bytes) -> None:
        """Send a record; an empty one only shows that this end lives."""
        tag = self._sent.tag(payload)
        self._writer.write(_LENGTH.pack(len(payload)) + payload + tag)
        await self._writer.drain()

    async def receive(self) -> bytes:
        """The payload of the next record that is not empty.

        Raises:
            StrangerError: the record is too long, or its proof is wrong.
            EOFError: the other end is gone.
        """
        while True:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MOST_BYTES:
                raise StrangerError(f"a record of {length} bytes; at most {MOST_BYTES} are allowed")
            record = await self._reader.readexactly(length + _TAG_BYTES)
            payload, tag = record[:length], record[length:]
            if not hmac.compare_digest(self._received.tag(payload), tag):
                raise StrangerError("a record's proof is wrong")
            self.quiet_beats = 0
            if payload:
                return payload

    async def keep(self, silent_beats: int) -> None:
        """Show the other end that this one lives, until the other is silent for so many beats."""
        while self.quiet_beats < silent_beats:
            await asyncio.sleep(BEAT_S)
            self.quiet_beats += 1
            await self.send(b"")

    def close(self) -> None:
        self._writer.close()


async def greet(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    key: bytes,
    within_s: float = GREETING_S,
) -> Link:
    """The client's end of a new link.

    Raises:
        StrangerError: the server does not hold the key.
        ConnectionError: the server ended the connection.
        TimeoutError: no answer in time.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    writer.write(_GREETING + nonce)
    async with asyncio.timeout(within_s):
        try:
            nonces = nonce + await reader.readexactly(_NONCE_BYTES)
            proof = await reader.readexactly(_PROOF_BYTES)
        except EOFError:
            raise ConnectionError("the other end left during the greeting") from None
        if not hmac.compare_digest(_proof(key, b"server", nonces), proof):
            raise StrangerError("the other end does not hold the run's secret")
        writer.write(_proof(key, b"client", nonces))
        await writer.drain()
    return Link(reader, writer, (_proof(key, b"up", nonces), _proof(key, b"down", nonces)))


async def greeted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> Link:
    """The server's end of a new link.

    Raises:
        StrangerError: the client does not hold the key, or left during the greeting.
        EOFError: the client left and sent nothing.
        TimeoutError: the client did not prove it in time.
    """
    async with asyncio.timeout(GREETING_S):
        try:
            if await reader.readexactly(len(_GREETING)) != _GREETING:
                raise StrangerError("the client did not greet as a link does")
            nonces = await reader.readexactly(_NONCE_BYTES) + secrets.token_bytes(_NONCE_BYTES)
            writer.write(nonces[_NONCE_BYTES:] + _proof(key, b"server", nonces))
            proof = await reader.readexactly(_PROOF_BYTES)
        except asyncio.IncompleteReadError as error:
            if error.expected == len(_GREETING) and not error.partial:
                raise
            raise StrangerError("the client left during the greeting") from None
    if not hmac.compare_digest(_proof(key, b"client", nonces), proof):
        raise StrangerError("the client does not hold the run's secret")
    return Link(reader, writer, (_proof(key, b"down", nonces), _proof(key, b"up", nonces)))


def _proof(key: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, role + b"\0" + nonces, "sha256")


async def splice(
    link: Link,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    silent_beats: int,
) -> None:
    """Carry bytes between a link and a plain connection until an end of either; then close both.

    Args:
        silent_beats: how long the link's other end may be silent.
    Raises:
        StrangerError: what came over the link was altered.
    """

    async def outgoing() -> None:
        while payload := await reader.read(MOST_BYTES):
            await link.send(payload)

    async def incoming() -> None:
        while True:
            writer.write(await link.receive())
            await writer.drain()

    ways = [asyncio.create_task(way) for way in (outgoing(), incoming(), link.keep(silent_beats))]
    try:
        ended, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ended:
            if isinstance(error := way.exception(), StrangerError):
                raise error
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        link.close()
        writer.close()
