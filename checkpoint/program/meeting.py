"""An exchange of values between the ranks of a program, by which errors reach all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from torch.distributed import PrefixStore, Store, TCPStore

from holdfast.parallel.errors import CheckpointError, in_a_line
from holdfast.parallel.reading import of_kind, parse_json

_Found = TypeVar("_Found")
_TURN_S = 0.1
_MOST_TURNS = 10
"""The last of the ranks that wait for a turn of their own."""


class _Answer(Struct, frozen=True):
    """What a rank found: an error, or a value for the others."""

    error: str
    content: Any = None


class Meeting:
    """The ranks of a program. Every exchange is collective."""

    def __init__(self, rank: int, size: int, store: Store, timeout_s: float) -> None:
        """Meet at a store.

        Args:
            timeout_s: the longest wait for another rank, in seconds.
        """
        self.rank, self.size, self.store = rank, size, store
        self._timeout_s = timeout_s
        self.exchanges = 0
        """The number of exchanges so far, equal on all ranks."""
        self._last = ""
        """This rank's key of the last exchange."""

    def exchange(self, what: str, mine: Any) -> list[Any]:
        """The values of all ranks, by rank.

        Raises:
            CheckpointError: a rank did not come in time; it is named. Or the store is gone.
        """
        self.exchanges += 1
        began_s = time.monotonic()
        key = f"{what}-{self.exchanges}"
        own = f"{key}/{self.rank}"
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        try:
            self.store.set(own, msgspec.json.encode(mine).decode())
            self._await(keys)
            told = self.store.multi_get(keys)
            # Every rank is in this exchange, so it has read all of the one before.
            if self._last:
                self.store.delete_key(self._last)
        except RuntimeError as error:
            raise CheckpointError(
                f"rank {self.rank} has lost the rendezvous store{_place_of(self.store)} "
                f"{time.monotonic() - began_s:.1f} s after it began to exchange {what!r} with the "
                f"other ranks: {str(error).splitlines()[0]}; the process that hosts the store has "
                "ended or cannot be reached: see its log, and start the program again, which can "
                "load the last checkpoint that was saved"
            ) from error
        self._last = own
        return [_told(rank, text) for rank, text in enumerate(told)]

    def _await(self, keys: list[str]) -> None:
        try:
            self.store.wait(keys, timedelta(seconds=min(self._timeout_s, 1e6)))
        except RuntimeError as error:
            missing = [str(r) for r, k in enumerate(keys) if not self.store.check([k])]
            raise CheckpointError(
                f"no word in time from rank {', '.join(missing[:4])}"
                + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
                + "; all ranks have to save and load together"
            ) from error

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let an error that all ranks raise at one instant leave one rank after the other.

        Their messages would run into each other where ranks write to one terminal or file.
        """
        try:
            yield
        except CheckpointError:
            time.sleep(_TURN_S * min(self.rank, _MOST_TURNS))
            raise

    def agree(
        self, what: str, find: Callable[[], _Found], told: Callable[[_Found], Any]
    ) -> tuple[_Found, list[Any]]:
        """What `find` returns, and what `told` makes of it on every rank, by rank.

        Raises:
            CheckpointError: `find` raised on some rank; every rank raises the first rank's message.
        """
        mine: list[_Found] = []
        error, cause = "", None
        content: Any = None
        try:
            mine.append(find())
            content = told(mine[0])
        except CheckpointError as failure:
            error, cause = str(failure), failure
        except Exception as failure:
            error, cause = in_a_line(failure), failure
        answers = self.exchange(what, {"error": error, "content": content})
        found = [_answer(rank, told) for rank, told in enumerate(answers)]
        failed = [(rank, answer.error) for rank, answer in enumerate(found) if answer.error]
        if failed:
            rank, reason = failed[0]
            where = f"rank {rank}: " if self.size > 1 else ""
            raise CheckpointError(f"{where}{reason}") from cause
        return mine[0], [answer.content for answer in found]


def _place_of(store: Store) -> str:
    """Where a store is, as text; empty if that is not known."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return f" at {store.host}:{store.port}" if isinstance(store, TCPStore) else ""


def _told(rank: int, text: bytes) -> Any:
    """The value that a rank has set at the store.

    Raises:
        CheckpointError: it is no value.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"rank {rank} sent no message of this exchange: {error}") from error


def _answer(rank: int, told: Any) -> _Answer:
    """What a rank says to `agree`.

    Raises:
        CheckpointError: it is no such answer.
    """
    try:
        return of_kind(told, _Answer)
    except ValueError as error:
        raise CheckpointError(f"rank {rank} sent no message of this exchange: {error}") from error
