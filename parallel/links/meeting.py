"""The processes of a job find each other: each asks by its number, and the first answers all."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from holdfast.parallel.errors import first_line
from holdfast.parallel.links.door import Door
from holdfast.parallel.links.link import Link, StrangerError, greet

_NUMBER_BYTES = 4
_LOOK_S = 1.0
_RETRY_S = 0.2
_STRANGE_TRIES = 50
"""How often a door with another key is tried: the last run at an address may not have left yet."""

_T = TypeVar("_T")


def answer_all(
    listening: socket.socket,
    key: bytes,
    tasks: Collection[int],
    answer: Callable[[Mapping[int, bytes]], bytes],
    left_s: Callable[[list[int]], float],
) -> list[int]:
    """Send the answer to each of these tasks, after all of them have asked. Local.

    Args:
        listening: the result of `listen`; it is closed.
        answer: returns the answer, given what each has said with its question; each of these is at
            most 64 KiB.
        left_s: returns the seconds that are left, given the tasks that have not asked.
    Returns:
        The tasks that have not asked in time; then no task was answered.
    """
    come: dict[int, Link] = {}
    said: dict[int, bytes] = {}
    news = threading.Semaphore(0)
    answered = asyncio.Event()

    async def serve(link: Link) -> None:
        question = await link.receive()
        task = int.from_bytes(question[:_NUMBER_BYTES], "big")
        if task in tasks:
            said[task] = question[_NUMBER_BYTES:]
            come[task] = link  # a task that asks again has given up its first question
            news.release()
            await answered.wait()

    async def tell(told: bytes) -> None:
        await asyncio.gather(*(link.send(told) for link in come.values()), return_exceptions=True)
        answered.set()

    door = Door(listening, key, serve)
    try:
        while (missing := sorted(set(tasks) - come.keys())) and (left := left_s(missing)) > 0:
            news.acquire(timeout=min(left, _LOOK_S))
        if not missing:
            door.call(tell(answer(said)))
        return missing
    finally:
        door.close()


def until_answered(
    attempt: Callable[[float], _T],
    left_s: Callable[[str], float],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> _T:
    """Try to reach a door until that succeeds. Returns what the attempt returns.

    Args:
        attempt: given the seconds that are left; `ask` or `knock`.
        left_s: returns these seconds, given why the last attempt has failed.
    Raises:
        StrangerError: what answers does not hold the key, also after 10 s.
        TimeoutError: nothing has answered in time; its text says why.
    """
    reason, strange = "", 0
    while (left := left_s(reason)) > 0:
        try:
            return attempt(left)
        except StrangerError as error:
            reason, strange = str(error), strange + 1
            if strange == _STRANGE_TRIES:
                raise
        except (OSError, EOFError) as error:
            number = getattr(error, "errno", None) or 0
            told = getattr(error, "strerror", None) or first_line(error)
            reason = os.strerror(number) if number > 0 else told
        sleep(_RETRY_S)
    raise TimeoutError(reason)


def knock(address: str, key: bytes, within_s: float) -> None:
    """Return if what listens at HOST:PORT is a door with this key.

    Raises:
        StrangerError: it does not hold the key.
        OSError: it cannot be reached, or does not answer in time.
    """

    async def knocked() -> None:
        host, _, port = address.rpartition(":")
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                await greet(reader, writer, key, within_s)
            finally:
                writer.close()

    asyncio.run(knocked())


def ask(
    host: str, port: int, key: bytes, task: int, within_s: float, word: bytes = b""
) -> tuple[bytes, str]:
    """The answer of the first process, and this machine's address towards it. Local.

    Args:
        word: what this process says with its question.
    Raises:
        StrangerError: the process there does not hold the key.
        OSError, EOFError: it cannot be reached, or left without an answer.
    """

    async def asked() -> tuple[bytes, str]:
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                own = str(writer.get_extra_info("sockname")[0])
                link = await greet(reader, writer, key, within_s)
                await link.send(task.to_bytes(_NUMBER_BYTES, "big") + word)
                return await link.receive(), own
            finally:
                writer.close()

    return asyncio.run(asked())
