"""Flight recorder: a ring of a rank's newest communication operations, with their times.

Every message of every communicator leaves one record. With a path the ring is a shared mapping of
that file. An agent can then see the last operations of a stopped or hung process without its help:
the writer takes no lock and makes no system call. `read_record` reads the ring, and elastic/hang.py
finds hangs in it. Work that sends no message (a save, a load, an evaluation) is marked as busy,
with the instant until which it may last.

Layout of a record: native-endian 64-bit words, all offsets in words.

    header    0 magic    1 layout version    2 rank    3 pid    4 generation    5 slots
              6 unix time less monotonic time, seconds (float64)    7 number of the newest step
    steps     8..23      monotonic times (float64) at which the last 16 steps began, at step % 16
    busy      24..26     kind of work (0: none), and the monotonic times (float64; 0: never) until
                         which it may last and at which the last one ended
    groups    32..287    32 names of 64 bytes, UTF-8, zero-padded
    ring      288..      slots of 12 words: number (0: empty or being written), group, operation,
                         direction, peer, bytes, tag, outcome (0 open, 1 done, 2 failed), and the
                         monotonic times (float64; NaN: not yet) posted, started, waited, finished

The operation with number n (1, 2, ...) lies in slot n % slots.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import statistics
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.parallel.comm.tags import COLLECTIVES
from holdfast.parallel.files import create_file
from holdfast.parallel.reading import read_regular

Direction = Literal["send", "receive", "collective"]
Outcome = Literal["open", "done", "failed"]
BusyKind = Literal[
    "build",
    "prepare",
    "load",
    "read",
    "save",
    "evaluate",
    "compare",
    "report",
    "offload",
    "compile",
]
"""Work that sends no message: build a training; prepare a change of ranks; load a checkpoint; read
data; wait for a save; evaluate; compare or digest state; write records; wait for a drive that has
activations or takes them; compile code for shapes that are new."""

OPERATIONS = (
    "send",
    "receive",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "barrier",
)
_DIRECTIONS: tuple[Direction, ...] = ("send", "receive", "collective")
_OUTCOMES: tuple[Outcome, ...] = ("open", "done", "failed")
_OPERATION_CODES = {name: code for code, name in enumerate(OPERATIONS)}
_DIRECTION_CODES = {name: code for code, name in enumerate(_DIRECTIONS)}
_MAGIC = int.from_bytes(b"HFOPRING", "little")
_BUSY_KINDS: tuple[BusyKind, ...] = get_args(BusyKind)
_VERSION = 2
_STEPS_AT, _STEPS = 8, 16
_BUSY, _BUSY_UNTIL, _BUSY_ENDED = 24, 25, 26
_NAMES_AT, _NAMES, _NAME_BYTES = 32, 32, 64
_RING_AT = _NAMES_AT + _NAMES * _NAME_BYTES // 8
_SLOT = 12
_OUTCOME, _STARTED, _WAITED, _FINISHED = 7, 9, 10, 11
_RECORD = struct.Struct("@qqqqqqqdddd")
_NAN = math.nan
_MOST_BYTES = 1 << 24
SLOTS = 512
"""The ring's size: more than the messages a rank has in flight, so open ones are not
overwritten."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One message of a communicator. Times are monotonic seconds; NaN: not yet."""

    number: int
    """The operation's number among all of the rank, from 1."""
    group: str
    operation: str
    """The call of the message, one of `OPERATIONS`; a collective is recorded message by message."""
    direction: Direction
    peer: int
    """The global rank; -1 for a collective that the transport runs as a whole."""
    bytes: int
    tag: int
    outcome: Outcome
    posted_s: float
    """The time of the call."""
    started_s: float
    """The time at which the transport took it, connected with the peer."""
    waited_s: float
    """The time at which the rank began to wait for it."""
    finished_s: float
    """The time at which the rank saw its end."""

    @property
    def is_waited_for(self) -> bool:
        return self.outcome == "open" and not math.isnan(self.waited_s)


@dataclass(frozen=True, slots=True)
class FlightRecord:
    """A copy of a rank's record at one moment."""

    rank: int
    pid: int
    generation: int
    step: int
    unix_offset_s: float
    """Unix time less monotonic time on the rank's machine, in seconds."""
    operations: Sequence[Operation]
    """The operations in the order of their calls."""
    step_starts_s: tuple[float, ...] = field(default=())
    """The times at which the newest steps began, oldest first; at most 16."""
    busy: BusyKind | None = None
    """The work without messages that the rank does now."""
    busy_until_s: float = 0.0
    """The time until which that may last; it counts only while `busy` is set."""
    busy_ended_s: float = 0.0
    """The time at which the last such work ended; 0: there was none."""

    @property
    def median_step_s(self) -> float:
        """The median duration of the newest steps; 0 while fewer than two have begun."""
        spans = [after - before for before, after in itertools.pairwise(self.step_starts_s)]
        return statistics.median(spans) if spans else 0.0

    @property
    def waited_for(self) -> list[Operation]:
        """The operations that the rank waits for, in the order of their calls."""
        found = self.operations
        left = found.not_ended() if isinstance(found, _Ring) else found
        return [operation for operation in left if operation.is_waited_for]


class _Ring(Sequence[Operation]):
    """The operations in a copy of a record, each of them made when it is asked for.

    Agents look at each record ten times a second and mostly ask for the few that are open.
    """

    def __init__(self, data: bytes, steady: memoryview) -> None:
        """Check the codes of all.

        Args:
            steady: the words of a later copy; operations that it lacks are left out.
        Raises:
            ValueError: an operation has a code of nothing.
        """
        self._data = data
        self._words, self._times = memoryview(data).cast("q"), memoryview(data).cast("d")
        codes = {1: _NAMES, 2: len(OPERATIONS), 3: len(_DIRECTIONS), _OUTCOME: len(_OUTCOMES)}
        for word, count in codes.items():
            column = self._column(word)
            for code in (min(column, default=0), max(column, default=0)):
                if not 0 <= code < count:
                    raise ValueError(f"the record has an operation with the unknown code {code}")
        self._outcomes = self._column(_OUTCOME)
        numbers, later = (words[_RING_AT::_SLOT].tolist() for words in (self._words, steady))
        found = sorted((n, at) for at, n in enumerate(numbers) if n and later[at] == n)
        self._slots = [slot for _, slot in found]

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Operation]:
        return map(self._operation, self._slots)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def not_ended(self) -> list[Operation]:
        """Those that have not ended."""
        return [self._operation(slot) for slot in self._slots if self._outcomes[slot] == 0]

    def _column(self, word: int) -> list[int]:
        """One word of all slots, the empty ones too."""
        return self._words[_RING_AT + word :: _SLOT].tolist()

    def _operation(self, slot: int) -> Operation:
        at = _RING_AT + slot * _SLOT
        number, group, operation, direction, peer, size, tag, outcome = self._words[at : at + 8]
        name_at = 8 * _NAMES_AT + group * _NAME_BYTES
        name = self._data[name_at : name_at + _NAME_BYTES].rstrip(b"\0")
        return Operation(
            number,
            str(name, errors="replace"),
            OPERATIONS[operation],
            _DIRECTIONS[direction],
            peer,
            size,
            tag,
            _OUTCOMES[outcome],
            *self._times[at + 8 : at + 12],
        )


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """The part of one rank in a message that has ended."""

    group: str
    tag: int
    turn: int
    """The number of the message among those of its tag since `FlightRecorder.begin_window`."""
    peer: int
    is_send: bool
    bytes: int
    began_s: float
    """The time at which the transport took it."""
    ended_s: float
    """The time at which the rank saw its end."""
    is_bound: bool
    """Whether it may have ended earlier: the rank did not have to wait for it."""
    by_device: bool = False
    """Whether the span was measured by the device, so that it has a length and no place in time."""


_BLOCKED_S = 1e-4
"""A wait that takes longer was blocked; a shorter one may be for what has ended long ago."""
_MOST_TURNS = 1 << 16
"""Tags whose messages are counted at a time."""
_SHORT_S = 1e-3
"""Of what took no longer, that does not matter."""


class FlightRecorder:
    """The writer of a rank's record. Threads may post at the same time."""

    def __init__(
        self, rank: int, *, generation: int = 0, path: Path | None = None, slots: int = SLOTS
    ) -> None:
        """Local.

        Args:
            path: the shared file, replaced if it exists (best in memory, below /dev/shm); None: the
                ring is private to the process.
            slots: the number of operations in the ring.
        """
        size = 8 * (_RING_AT + _SLOT * slots)
        memory = mmap.mmap(-1, size) if path is None else _new_file(path, size)
        self._memory = memory
        self._words = memoryview(memory).cast("q")
        self._times = memoryview(memory).cast("d")
        self._slots = slots
        self._numbers = itertools.count(1)
        self._newest = 0
        self._turns: dict[tuple[int, str, int, int], int] = {}
        self._turn_of = [0] * slots
        self._device_s = [(0, 0.0)] * slots
        """By slot, the number of an operation and what the device says that it took."""
        self._groups: dict[str, int] = {}
        self.blocked_s = 0.0
        """Seconds that the recorder's own thread has waited on the host for operations."""
        self._thread = threading.get_ident()
        words = self._words
        words[1], words[2], words[3], words[5] = _VERSION, rank, os.getpid(), slots
        self._times[6] = time.time() - time.monotonic()
        self.set_generation(generation)
        words[0] = _MAGIC

    def set_generation(self, generation: int) -> None:
        self._words[4] = generation

    def note_step(self, step: int) -> None:
        """Note that `step` begins; readers compute the usual length of a step from these marks."""
        self._times[_STEPS_AT + step % _STEPS] = time.monotonic()
        self._words[7] = step

    @contextmanager
    def busy(self, kind: BusyKind, seconds: float) -> Iterator[None]:
        """Mark the block as work without messages that may last `seconds` from now.

        A mark inside another one counts until it ends; then the outer one counts again.
        """
        words, times = self._words, self._times
        outer, outer_until_s = words[_BUSY], times[_BUSY_UNTIL]
        # The instant first: a reader in between must not meet a mark that has run out.
        times[_BUSY_UNTIL] = max(time.monotonic() + seconds, outer_until_s if outer else 0.0)
        words[_BUSY] = 1 + _BUSY_KINDS.index(kind)
        try:
            yield
        finally:
            times[_BUSY_ENDED] = time.monotonic()
            words[_BUSY] = outer
            times[_BUSY_UNTIL] = outer_until_s

    @property
    def step(self) -> int:
        """The number of the newest step."""
        return self._words[7]

    @property
    def median_step_s(self) -> float:
        """The median duration of the newest steps; 0 while fewer than two have begun."""
        return self.record().median_step_s

    def group(self, name: str) -> int:
        """The code of a group's name; once the table is full, new names share the last code."""
        code = self._groups.get(name)
        if code is None:
            code = self._groups[name] = min(len(self._groups), _NAMES - 1)
            text = name.encode()[: _NAME_BYTES - 1].ljust(_NAME_BYTES, b"\0")
            at = _NAMES_AT * 8 + code * _NAME_BYTES
            self._memory[at : at + _NAME_BYTES] = text
        return code

    def post(
        self, group: int, operation: str, direction: Direction, peer: int, size: int, tag: int
    ) -> int:
        """Record a call. Returns its number."""
        number = self._newest = next(self._numbers)
        if tag < COLLECTIVES.first:  # the tags of collectives count themselves
            key = (group, direction, peer, tag)
            self._turn_of[number % self._slots] = turn = self._turns.get(key, 0)
            if not turn and len(self._turns) >= _MOST_TURNS:  # there are no windows
                self._turns.clear()
            self._turns[key] = turn + 1
        at = _RING_AT + number % self._slots * _SLOT
        self._words[at] = 0
        _RECORD.pack_into(
            self._memory,
            8 * at + 8,
            group,
            _OPERATION_CODES[operation],
            _DIRECTION_CODES[direction],
            peer,
            size,
            tag,
            0,
            time.monotonic(),
            _NAN,
            _NAN,
            _NAN,
        )
        self._words[at] = number
        return number

    def started(self, number: int) -> None:
        at = _RING_AT + number % self._slots * _SLOT
        if self._words[at] == number:
            self._times[at + _STARTED] = time.monotonic()

    def waiting(self, number: int) -> float:
        """Record that the rank waits from now on. Returns the time, for `finished`."""
        now = time.monotonic()
        at = _RING_AT + number % self._slots * _SLOT
        if self._words[at] == number:
            self._times[at + _WAITED] = now
        return now

    def waits_no_more(self, number: int) -> None:
        """Record that the rank waits for something else now, though the operation is not done."""
        at = _RING_AT + number % self._slots * _SLOT
        if self._words[at] == number:
            self._times[at + _WAITED] = _NAN

    def finished(self, number: int, *, failed: bool = False, since: float = _NAN) -> None:
        """Record the end of an operation.

        Args:
            since: the time at which the rank began to wait, if it did nothing else meanwhile.
        """
        if since == since:
            self.waited(since)
        at = _RING_AT + number % self._slots * _SLOT
        if self._words[at] == number:
            self._times[at + _FINISHED] = time.monotonic()
            self._words[at + _OUTCOME] = 2 if failed else 1

    def waited(self, since: float) -> None:
        """Record that a wait is over in which the rank did nothing else: it began at `since`."""
        if threading.get_ident() == self._thread:
            self.blocked_s += time.monotonic() - since

    def begin_window(self) -> int:
        """Count the messages of each tag from 0 again. Returns the number of the newest operation.

        Ranks do so at the same place of their programs, so that both ends of a message count alike.
        """
        self._turns = {}
        return self._newest

    def timed(self, number: int, seconds: float) -> None:
        """Record what an operation took by the device's clock. From the recorder's own thread."""
        self._device_s[number % self._slots] = (number, seconds)

    def message_ends(self, since: int, least_bytes: int) -> list[MessageEnd]:
        """The ended messages of a window that the ring still has, oldest first. Local.

        Args:
            since: the result of `begin_window`.
            least_bytes: shorter ones are left out.
        """
        names = {code: name for name, code in self._groups.items()}
        numbers = self._words[_RING_AT::_SLOT].tolist()
        found = []
        for number in sorted(n for n in numbers if n > since):
            slot = number % self._slots
            at = 8 * (_RING_AT + slot * _SLOT + 1)
            group, _, direction, peer, size, tag, outcome, *times = _RECORD.unpack_from(
                self._memory, at
            )
            if outcome != 1 or size < least_bytes or _DIRECTIONS[direction] == "collective":
                continue
            _, started_s, waited_s, finished_s = times
            timed, device_s = self._device_s[slot]
            by_device = timed == number
            if by_device:
                started_s = finished_s - device_s
            took_s = finished_s - started_s
            turn = self._turn_of[slot] if tag < COLLECTIVES.first else 0
            found.append(
                MessageEnd(
                    names[group],
                    tag,
                    turn,
                    peer,
                    _DIRECTIONS[direction] == "send",
                    size,
                    started_s,
                    finished_s,
                    not by_device and took_s > _SHORT_S and not finished_s - waited_s > _BLOCKED_S,
                    by_device,
                )
            )
        return found

    def record(self) -> FlightRecord:
        """The present content of the ring. Local."""
        return parse_record(bytes(self._memory))

    def history(self, group: str | None = None) -> tuple[Operation, ...]:
        """The newest operations, of one group or of all, in the order of the calls."""
        return tuple(o for o in self.record().operations if group in (None, o.group))


def _new_file(path: Path, size: int) -> mmap.mmap:
    """A mapping of a new file, which appears under its name only in its full size."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with create_file(partial) as file:
        try:  # a page without room behind it would be a SIGBUS at its first use
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            partial.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from error
        memory = mmap.mmap(file.fileno(), size)
    partial.replace(path)
    return memory


def read_record(path: Path) -> FlightRecord:
    """Read another process's record. Local; the writer is not disturbed.

    Raises:
        OSError: the file does not exist, or is too large for a record.
        ValueError: the file is not a record of this version.
    """
    before = read_regular(path, _MOST_BYTES)
    return parse_record(before, read_regular(path, _MOST_BYTES))


def parse_record(data: bytes, later: bytes | None = None) -> FlightRecord:
    """The record in some bytes. Pure.

    Args:
        later: a later copy. Operations whose number has changed by then may be half replaced, and
            are left out.
    Raises:
        ValueError: the bytes are not a record of this version.
    """
    if len(data) < 8 * _RING_AT or len(data) % 8:
        raise ValueError(f"{len(data)} bytes are not a record of operations; the file is cut off")
    if later is not None and len(later) != len(data):
        raise ValueError("the record was replaced meanwhile")
    words, times = memoryview(data).cast("q"), memoryview(data).cast("d")
    slots = words[5]
    if words[0] != _MAGIC or words[1] != _VERSION or len(words) != _RING_AT + slots * _SLOT:
        raise ValueError(
            f"not a record of operations, version {_VERSION}; another program wrote it"
        )
    ring = _Ring(data, words if later is None else memoryview(later).cast("q"))
    starts = sorted(t for t in times[_STEPS_AT : _STEPS_AT + _STEPS] if t > 0)
    busy = words[_BUSY]
    return FlightRecord(
        rank=words[2],
        pid=words[3],
        generation=words[4],
        step=words[7],
        unix_offset_s=times[6],
        operations=ring,
        step_starts_s=tuple(starts),
        busy=_BUSY_KINDS[busy - 1] if 1 <= busy <= len(_BUSY_KINDS) else None,
        busy_until_s=times[_BUSY_UNTIL],
        busy_ended_s=times[_BUSY_ENDED],
    )
