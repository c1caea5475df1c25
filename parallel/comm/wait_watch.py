"""The watch of waits: a thread looks at this rank's flight record, and asks the others.

It is for runs without agents, in which no process watches the ranks. A rank that has waited too
long posts in the rendezvous store for which ranks, and a busy one posts that; the others post
nothing. By following these words a waiting rank finds the ranks that wait for none: they are slow,
stopped or cut off. Nothing is done about them; a person is told.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from holdfast.parallel.comm.flight_recorder import FlightRecord, FlightRecorder, Operation
from holdfast.parallel.comm.tags import kind_of
from holdfast.parallel.errors import first_line
from holdfast.parallel.output import TELL_AFTER_S
from holdfast.parallel.reading import decode_json

if TYPE_CHECKING:
    from torch.distributed import Store

    from holdfast.parallel.comm.groups import Groups

logger = logging.getLogger("holdfast.comm")

_LOOK_S = 1.0
_LIMIT_STEPS = 3.0
"""A wait is worth telling only if it is also longer than this many median steps."""
_UNKNOWN_S = 20.0
"""The same while the usual length of a step is unknown."""
_POST_S = 1.0
"""So long before a wait is told it is posted, for those that wait for this rank."""
_AGAIN = 3.0
"""A wait that goes on is told again after so many times the time."""
_EDGE = 8
"""So many of the lowest and of the highest ranks ask what many others do: each answer costs the
store two requests, and a group may be all ranks of a cluster."""
_FRESH_S = 15.0
"""Words are posted again within a third of this time; one that is older is not believed."""


class Word(msgspec.Struct, frozen=True):
    """What a rank says in the store about what it does now."""

    number: int
    """How many words this rank has posted; a rank that lives posts on."""
    peers: tuple[int, ...] = ()
    """The ranks that it waits for."""
    busy: str = ""
    """The work without messages that it does."""


@dataclass(frozen=True, slots=True)
class LongWait:
    """A wait of this rank, from its flight record."""

    operation: Operation
    step: int
    seconds: float
    peers: frozenset[int]


@dataclass(frozen=True, slots=True)
class WaitNews:
    """What there is to tell of a wait."""

    rank: int
    seconds: float
    step: int
    operation: str
    """What is sent or received, or the collective's name."""
    peers: tuple[int, ...]
    """The ranks that are waited for, and wait for none themselves."""
    is_over: bool
    is_teller: bool
    """Whether this rank is the one that tells a person; the others keep it in their logs."""

    def line(self) -> str:
        """The news in a line."""
        named = ", ".join(map(str, self.peers[:8])) + (" and more" if len(self.peers) > 8 else "")
        several = len(self.peers) > 1
        them = f"rank{'s' if several else ''} {named}"
        if self.is_over:
            return f"rank {self.rank} went on after {self.seconds:.0f} s; it waited for {them}"
        where = f"in step {self.step}" if self.step else "before the first step"
        why = "they wait for no others: they are" if several else "it waits for no other: it is"
        return (
            f"rank {self.rank} has waited {self.seconds:.0f} s for {them} ({self.operation}, "
            f"{where}); {why} slow, stopped or cut off"
        )


@dataclass(frozen=True, slots=True)
class _ToldWait:
    """A wait that was told."""

    wait: LongWait
    ends: frozenset[int]
    """The ranks that were named."""
    due_s: float
    """How long it has to last to be told again."""


def longest_wait(
    record: FlightRecord, groups: Mapping[str, Sequence[int]], now_s: float, awake_s: float
) -> LongWait | None:
    """The longest wait of a rank at a moment; None: it waits for nothing. Pure.

    Args:
        groups: the ranks of each group, by its name in the record.
        awake_s: the time before which this process may itself have been stopped.
    """
    waits = record.waited_for
    if not waits:
        return None
    first = min(waits, key=lambda operation: operation.waited_s)
    peers: set[int] = set()
    for operation in waits:
        of_group = groups.get(operation.group, ())
        peers |= {operation.peer} if operation.peer >= 0 else set(of_group)
    seconds = now_s - max(first.waited_s, awake_s)
    return LongWait(first, record.step, seconds, frozenset(peers - {record.rank}))


def limit_of(record: FlightRecord) -> float:
    """Seconds after which a wait is told. Pure."""
    median_s = record.median_step_s
    return max(TELL_AFTER_S, _LIMIT_STEPS * median_s) if median_s else _UNKNOWN_S


def ends_of_chain(
    rank: int, peers: frozenset[int], word_of: Callable[[int], Word | None]
) -> frozenset[int]:
    """The ranks for which a rank waits in the end, and that are neither busy nor wait themselves.

    If all wait in a circle, its own peers.

    Args:
        word_of: returns the newest word of a rank; None: it says nothing, or not any more.
    """
    seen, ahead, ends, is_busy = {rank}, set(peers), set[int](), False
    while ahead:
        seen |= ahead
        following: set[int] = set()
        for peer in ahead:
            word = word_of(peer)
            if word is None:
                ends.add(peer)
            elif word.busy:
                is_busy = True
            else:
                following |= set(word.peers)
        ahead = following - seen
    return frozenset(ends or (() if is_busy else peers))


class WaitWatch:
    """Tells of long waits of one rank, from a thread, until it is closed."""

    def __init__(
        self,
        rank: int,
        groups: Mapping[str, Sequence[int]],
        recorder: FlightRecorder,
        store: Store,
        tell: Callable[[WaitNews], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is watched yet.

        Args:
            groups: the ranks of each group; "world" has all of them.
            tell: gets the news, in the thread.
        """
        self._rank, self._groups, self._recorder = rank, groups, recorder
        world = sorted(groups["world"])
        self._askers = frozenset(world[:_EDGE] + world[-_EDGE:])
        self._tell, self._clock = tell, clock
        self._looked_s = self._awake_s = clock()
        self._words = _Words(rank, store, clock)
        self._step = -1
        """The step at the last look."""
        self._told: _ToldWait | None = None
        self._stop = threading.Event()

    def look(self) -> None:
        """Look once, and tell what there is to tell."""
        now_s = self._clock()
        if now_s - self._looked_s > 4 * _LOOK_S:  # this process was itself stopped, or starved
            self._awake_s = now_s
        self._looked_s = now_s
        step, self._step = self._step, self._recorder.step
        if step != self._step and self._told is None and not self._words.stand:
            return  # a rank that makes steps waits for nobody
        record = self._recorder.record()
        wait = longest_wait(record, self._groups, now_s, self._awake_s)
        told = self._told
        if told is not None and (
            wait is None or wait.operation.number != told.wait.operation.number
        ):
            seconds = now_s - told.wait.operation.waited_s
            self._say(seconds, told.wait, told.ends, is_over=True)
            self._told = None
        limit_s = limit_of(record)
        if record.busy is not None and now_s < record.busy_until_s:
            self._words.post((), record.busy)
        elif wait is not None and wait.seconds >= limit_s - _POST_S:
            self._words.post(tuple(sorted(wait.peers)), "")
            self._judge(wait, limit_s)
        else:
            self._words.withdraw()

    def _judge(self, wait: LongWait, limit_s: float) -> None:
        due_s = limit_s if self._told is None else self._told.due_s
        asks = self._rank in self._askers or len(wait.peers) <= 2 * _EDGE
        if wait.seconds < due_s or not asks:
            return
        ends = ends_of_chain(self._rank, wait.peers, self._words.of)
        if ends:
            self._told = _ToldWait(wait, ends, _AGAIN * wait.seconds)
            self._say(wait.seconds, wait, ends, is_over=False)

    def _say(self, seconds: float, wait: LongWait, ends: frozenset[int], *, is_over: bool) -> None:
        teller = min((r for r in self._askers if r not in ends), default=self._rank)
        news = WaitNews(
            self._rank,
            seconds,
            wait.step,
            (wait.operation.peer >= 0 and kind_of(wait.operation.tag)) or wait.operation.operation,
            tuple(sorted(ends)),
            is_over,
            teller == self._rank,
        )
        self._tell(news)

    def start(self) -> None:
        """Begin to look, in a thread."""
        threading.Thread(target=self._run, name="holdfast-waits", daemon=True).start()

    def close(self) -> None:
        """Look no more. Does not wait for a look under way."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                self.look()
            except Exception as error:  # the store's host is gone: others tell of that
                logger.info("waits are no longer watched: %s", first_line(error))
                return


class _Words:
    """What ranks say in the store. It connects with the store when there is something to say."""

    def __init__(self, rank: int, store: Store, clock: Callable[[], float]) -> None:
        self._rank, self._store, self._clock = rank, store, clock
        self._client: Store | None = None
        """A client of its own: a wait of another thread would keep it."""
        self._own = Word(0)
        self._posted_s: float | None = None
        """When this rank's word was posted; None: it has none."""
        self._heard: dict[int, tuple[int, float]] = {}
        """By rank, the number of its newest word, and when that was first seen."""

    def post(self, peers: tuple[int, ...], busy: str) -> None:
        """Post what this rank does, if it is new or growing old."""
        now_s, own = self._clock(), self._own
        same = self._posted_s is not None and (own.peers, own.busy) == (peers, busy)
        if same and now_s - (self._posted_s or 0.0) < _FRESH_S / 3:
            return
        self._own, self._posted_s = Word(own.number + 1, peers, busy), now_s
        self._set(msgspec.json.encode(self._own).decode())

    @property
    def stand(self) -> bool:
        """Whether this rank's word stands in the store."""
        return self._posted_s is not None

    def withdraw(self) -> None:
        """Say nothing any more."""
        if self.stand:
            self._posted_s = None
            self._set("")

    def of(self, rank: int) -> Word | None:
        """The newest word of a rank; None: it says nothing, or has not said it again in time."""
        client, key = self._connected(), _key_of(rank)
        text = client.get(key) if client.check([key]) else b""
        if not text:
            return None
        try:
            word = decode_json(text, Word)
        except ValueError:
            return None
        number, since_s = self._heard.get(rank, (-1, 0.0))
        if word.number != number:
            since_s = self._clock()
            self._heard[rank] = (word.number, since_s)
        return word if self._clock() - since_s < _FRESH_S else None

    def _set(self, text: str) -> None:
        self._connected().set(_key_of(self._rank), text)

    def _connected(self) -> Store:
        if self._client is None:
            self._client = self._store.clone()  # pyrefly: ignore[missing-attribute]
        return self._client


def _key_of(rank: int) -> str:
    return f"waits/{rank}"


def watch_waits(
    groups: Groups, rank: int, store: Store, tell: Callable[[WaitNews], None]
) -> WaitWatch:
    """Begin to watch the waits of a rank in these groups. Local."""
    named = {"world": groups.world, "control": groups.control, **groups.axes}
    ranks = {name: group.ranks for name, group in named.items()}
    watch = WaitWatch(rank, ranks, groups.recorder, store, tell)
    if groups.world.size > 1:
        watch.start()
    return watch
