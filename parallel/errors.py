"""The errors that this project raises: one small tree, messages that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HoldfastError(Exception):
    """Base of every error that holdfast raises on purpose.

    The command line prints its message without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class ConfigError(HoldfastError, ValueError):
    """A value that the user gave is wrong: message = key, value, what is allowed."""

    exit_code = 2


class DataError(ConfigError):
    """Training data that cannot be used: unreadable, empty, too short, a token beyond the
    vocabulary.
    """


class LayoutError(HoldfastError, ValueError):
    """Boxes that leave a hole, overlap where they must not, or lie outside their tensor."""


class ScheduleError(HoldfastError, ValueError):
    """A set of programs that deadlocks, loses a micro-batch, or sends what nobody receives."""


class NumericsError(HoldfastError, ArithmeticError):
    """A gradient or loss that is not finite or not representable; the step was not applied."""


class PeerLost(HoldfastError, ConnectionError):
    """A rank of this generation is gone; a restart (or recovery) can cure it."""

    exit_code = 3


class CheckpointError(HoldfastError):
    """A checkpoint that is damaged, incomplete, of another model, or could not be written or
    read.
    """


class OffloadError(HoldfastError):
    """Activations that were sent out cannot be read back; the step was not applied."""

    exit_code = 3


class Stopped(HoldfastError):
    """The run was asked to end before its last step; starting it again goes on."""

    exit_code = 3


class MembershipError(HoldfastError):
    """This process cannot be a member of the run, or not at present; a restart can cure it."""

    exit_code = 3


class Minority(MembershipError):
    """Too few members of the last generation can be reached to go on without risking two runs in
    one.
    """


class Superseded(MembershipError):
    """The run has gone on without this process, whose state is therefore out of date."""


def unknown_name(key: str, name: str, allowed: Iterable[str]) -> str:
    """The message for a name that a registry does not have: the allowed ones and the nearest.

    Args:
        key: what has the name for its value, e.g. `parallel.schedule`.
        allowed: the names of the registry, in the order of the message.
    """
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key} = {name!r}: allowed are {', '.join(map(repr, names))}{hint}"
