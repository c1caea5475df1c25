"""The comparison of all ranks' terms over the rendezvous store, before they are connected.

The first rank publishes its terms; each other one answers with nothing if its own are equal, or
else with its own; the first rank publishes the verdict. So a rank costs the store three requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from torch.distributed import DistError, Store

from holdfast.parallel.errors import ConfigError, MembershipError, PeerLost, first_line
from holdfast.parallel.output import Waiting, tell_person
from holdfast.parallel.reading import decode_json
from holdfast.trainer.terms.terms import Terms, TermsDiffer, Verdict, judge

_LIMIT_S = 3600.0
"""Seconds that ranks wait for each other: one may have to tokenise its data."""
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.5
_FAREWELL_S = 10.0
"""Seconds for which a first rank that refuses waits until the others have read it: it may host the
store."""
_FIRST, _VERDICT, _READERS = "terms/first", "terms/verdict", "terms/readers"
_T = TypeVar("_T")

logger = logging.getLogger("holdfast")


def require_equal_terms(
    own: Callable[[], Terms],
    rank: int,
    ranks: Sequence[int],
    store: Store,
    *,
    check: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    """Compare this rank's terms with those of all others. Collective over `ranks`.

    Args:
        own: returns this rank's terms. If it raises, the other ranks are told, and do not train.
        check: called again and again during the waits; raises what ends them.
    Returns:
        Notes on differences that are allowed, for a person.
    Raises:
        TermsDiffer: the terms differ, or a rank has none; the message has a line for each
            difference, and is equal on every rank.
        PeerLost: a rank has not come in time.
    """
    try:
        terms = own()
    except Exception as error:
        _give_up(store, rank, ranks, error)
        raise
    try:
        verdict = compare_terms(terms, rank, ranks, store, check=check)
    except DistError as error:
        raise PeerLost(
            f"the rendezvous store is gone before all ranks have told what they train with: "
            f"{first_line(error)}; see the other logs"
        ) from error
    if verdict.refused:
        raise TermsDiffer("\n".join(verdict.refused))
    return verdict.notes


def compare_terms(
    own: Terms,
    rank: int,
    ranks: Sequence[int],
    store: Store,
    *,
    check: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] | None = None,
) -> Verdict:
    """The verdict on the terms of all ranks, equal on each. Collective over `ranks`.

    Args:
        tell: tells of a long wait; None: the first rank tells a person, the others their logs.
    Raises:
        PeerLost: a rank has not come in time.
    """
    first, *others = ranks
    tell = tell or (tell_person if rank == first else logger.info)

    def await_key(key: str, what: str) -> bytes:
        waiting, pause_s = Waiting(what, _LIMIT_S, tell=tell), _FIRST_PAUSE_S
        while not store.check([key]):
            check()
            if waiting.left_s() <= 0:
                raise PeerLost(f"{what} did not happen within {_LIMIT_S:g} s; see the other logs")
            sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return store.get(key)

    if rank != first:
        to_begin = f"rank {first} to tell its configuration and data"
        if _read(await_key(_FIRST, to_begin), Terms) == own:
            store.set(_answer_of(rank), "")
        else:
            store.set(_answer_of(rank), msgspec.json.encode(own).decode())
        told = await_key(_VERDICT, "all ranks to tell theirs")
        store.add(_READERS, 1)
        return _read(told, Verdict)
    store.set(_FIRST, msgspec.json.encode(own).decode())
    answers = {
        other: await_key(_answer_of(other), f"rank {other} to tell its configuration and data")
        for other in others
    }
    verdict = Verdict()
    if any(answers.values()):
        theirs = {other: _read(text, Terms) if text else own for other, text in answers.items()}
        verdict = judge({first: own, **theirs})
    _publish(store, verdict, len(others), sleep)
    return verdict


def _publish(store: Store, verdict: Verdict, others: int, sleep: Callable[[float], None]) -> None:
    """Tell the verdict; if it ends the ranks, wait until they have read it."""
    store.set(_VERDICT, msgspec.json.encode(verdict).decode())
    left_s = _FAREWELL_S if verdict.refused else 0.0
    while left_s > 0 and store.add(_READERS, 0) < others:
        sleep(_LONGEST_PAUSE_S / 10)
        left_s -= _LONGEST_PAUSE_S / 10


def _give_up(store: Store, rank: int, ranks: Sequence[int], error: Exception) -> None:
    """Tell the others that this rank cannot train, so that they do not wait for it."""
    terms = Terms(error=str(error) if isinstance(error, ConfigError) else first_line(error))
    text = msgspec.json.encode(terms).decode()
    if rank == ranks[0]:
        store.set(_FIRST, text)
        _publish(store, judge({rank: terms}), len(ranks) - 1, time.sleep)
    else:
        store.set(_answer_of(rank), text)
        store.add(_READERS, 1)


def _answer_of(rank: int) -> str:
    return f"terms/{rank}"


def _read(text: bytes, kind: type[_T]) -> _T:
    try:
        return decode_json(text, kind)
    except ValueError as error:
        raise MembershipError(
            f"another rank tells its configuration in an unknown way ({error}); install the same "
            "version of holdfast everywhere"
        ) from error
