"""The error tree of this project; messages say what to do."""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby

_UNPRINTABLE = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NO_THREAD = ("can't start new thread", os.strerror(errno.EAGAIN))
"""What Python and C++ say of a thread that may not begin."""
_MOST_SHOWN = 120
"""The most characters of a value in a message."""


class HoldfastError(Exception):
    """Base of every error that holdfast raises on purpose.

    The command line prints its message without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __str__(self) -> str:
        """The message as a terminal can show it, whatever names of files or keys are in it."""
        return printable(super().__str__())


class ConfigError(HoldfastError, ValueError):
    """A wrong value from the user. The message has the key, the value and what is allowed."""

    exit_code = 2


class TooFewRanks(ConfigError):
    """The ranks that are left make no stage replica, or none that has room for its part."""


class DataError(ConfigError):
    """Unusable training data: unreadable, empty, too short, or a token beyond the vocabulary."""


class LayoutError(HoldfastError, ValueError):
    """Boxes leave a hole, overlap where they must not, or lie outside their tensor."""


class ScheduleError(HoldfastError, ValueError):
    """A set of programs deadlocks, loses a micro-batch, or has a send without a receive."""


class NumericsError(HoldfastError, ArithmeticError):
    """A gradient or loss is not finite or not representable; the step was not applied."""


class Diverged(NumericsError):
    """Steps in a row could not be applied; no restart can cure it."""

    exit_code = 4


class ComputesWrongly(HoldfastError):
    """This rank has other results than the ranks that compute the same; others go on without it."""

    exit_code = 3


class Undecided(HoldfastError):
    """Ranks have different results of the same, and it is not known which are right."""

    exit_code = 3


class PeerLost(HoldfastError, ConnectionError):
    """A rank of this generation is gone; a restart or recovery can cure it."""

    exit_code = 3


class CheckpointError(HoldfastError):
    """A checkpoint is damaged, incomplete or of another model, or its reading or writing failed."""


class Unreadable(CheckpointError):
    """A checkpoint is not there, or cannot be read: whether it is damaged is not known."""


class Unanswered(HoldfastError):
    """A question about checkpoints has no answer: not "no", and not "yes"."""

    exit_code = 2


class NotSaved(CheckpointError):
    """The last step of a run is done and cannot be saved. A replaced worker cannot cure that."""


class OffloadError(HoldfastError):
    """Activations that were sent out cannot be read back; the step was not applied."""

    exit_code = 3


class Stopped(HoldfastError):
    """The run was asked to end before its last step; the same command continues it."""

    exit_code = 3


class Interrupted(Stopped):
    """A person has interrupted the run (SIGINT); the same command continues it."""

    exit_code = 130


class MembershipError(HoldfastError):
    """This process cannot be a member of the run, at least at present; a restart can cure it."""

    exit_code = 3


class Minority(MembershipError):
    """Too few members of the last generation can be reached to go on: a run must never split."""


class Superseded(MembershipError):
    """The run has gone on without this process, so its state is out of date."""


def printable(text: str) -> str:
    """The text with characters that control a terminal escaped; line breaks stay. Pure.

    Names that come from files could otherwise steer the terminal on which they are shown.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number of things, as in "1 rank" and "2 ranks". Pure.

    Args:
        plural: of the noun; by default with an s.
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def named_ranks(ranks: Sequence[int], between: str = ",") -> str:
    """Ranks as runs of numbers, as in "rank 2", "ranks 0-3" and "ranks 1,4-6". Pure.

    Args:
        ranks: ascending.
        between: what stands between runs.
    """
    runs = [
        [rank for _, rank in run]
        for _, run in groupby(enumerate(ranks), key=lambda item: item[1] - item[0])
    ]
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {between.join(shown)}"


def size_text(nbytes: float) -> str:
    """A number of bytes for a person, in the unit that fits it. Pure."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"


def first_line(error: BaseException) -> str:
    """What an error says first, as a terminal can show it; its kind where it says nothing. Pure."""
    return next(iter(printable(str(error)).splitlines()), "") or type(error).__name__


def in_a_line(error: BaseException) -> str:
    """The kind of an error and what it says first, as a terminal can show it. Pure.

    Below the first line, torch adds its stack.
    """
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def process_refusal(error: BaseException) -> str:
    """Why the system let no further process or thread begin; empty for other errors. Pure.

    An error of ours is asked for what it was raised from: torch begins threads in many places.
    """
    while isinstance(error, HoldfastError) and error.__cause__ is not None:
        # A lock that another holds is an EAGAIN as well, so of these only a thread's word counts.
        error = error.__cause__
        if isinstance(error, OSError):
            return ""
    begins = isinstance(error, OSError) and error.errno == errno.EAGAIN and not error.filename
    if begins or (isinstance(error, RuntimeError) and first_line(error) in _NO_THREAD):
        return (
            "no further process or thread may begin here: this user or container has as many as it "
            "is allowed (ulimit -u, pids.max); raise that limit, or end others"
        )
    return ""


def shown(value: object) -> str:
    """A value as Python writes it, cut where it is long. Pure."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} and more"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a table with such a number in it, or nested too deeply
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"


def number_fault(
    name: str, value: object, least: float, most: float = math.inf, *, whole: bool = True
) -> str:
    """The message for a number that is none, or out of its range; empty if it is neither. Pure.

    Args:
        name: the argument or key that has the value.
        whole: whether it counts something.
    """
    kinds = int if whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most:
        return ""
    allowed = f"from {least} on" if most == math.inf else f"from {least} to {most}"
    return f"{name} = {shown(value)}: allowed are {'whole ' if whole else ''}numbers {allowed}"


def unknown_name(key: str, name: str, allowed: Iterable[str]) -> str:
    """The message for a name that a registry lacks: the allowed names and the nearest one.

    Args:
        key: the key that has the name for its value, e.g. `parallel.schedule`.
        name: the unknown name.
        allowed: the names of the registry, in the order of the message.
    """
    names = list(allowed)
    near = difflib.get_close_matches(name[:_MOST_SHOWN], names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key} = {shown(name)}: allowed are {', '.join(map(repr, names))}{hint}"
