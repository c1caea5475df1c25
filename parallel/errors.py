"""The error tree of this project; messages say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HoldfastError(Exception):
    """Base of every error that holdfast raises on purpose.

    The command line prints its message without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class ConfigError(HoldfastError, ValueError):
    """A wrong value from the user. The message has the key, the value and what is allowed."""

    exit_code = 2


class DataError(ConfigError):
    """Unusable training data: unreadable, empty, too short, or a token beyond the vocabulary."""


class LayoutError(HoldfastError, ValueError):
    """Boxes leave a hole, overlap where they must not, or lie outside their tensor."""


class ScheduleError(HoldfastError, ValueError):
    """A set of programs deadlocks, loses a micro-batch, or has a send without a receive."""


class NumericsError(HoldfastError, ArithmeticError):
    """A gradient or loss is not finite or not representable; the step was not applied."""


class PeerLost(HoldfastError, ConnectionError):
    """A rank of this generation is gone; a restart or recovery can cure it."""

    exit_code = 3


class CheckpointError(HoldfastError):
    """A checkpoint is damaged, incomplete or of another model, or its reading or writing failed."""


class OffloadError(HoldfastError):
    """Activations that were sent out cannot be read back; the step was not applied."""

    exit_code = 3


class Stopped(HoldfastError):
    """The run was asked to end before its last step; the same command continues it."""

    exit_code = 3


class MembershipError(HoldfastError):
    """This process cannot be a member of the run, at least at present; a restart can cure it."""

    exit_code = 3


class Minority(MembershipError):
    """Too few members of the last generation can be reached to go on: a run must never split."""


class Superseded(MembershipError):
    """The run has gone on without this process, so its state is out of date."""


def unknown_name(key: str, name: str, allowed: Iterable[str]) -> str:
    """The message for a name that a registry lacks: the allowed names and the nearest one.

    Args:
        key: the key that has the name for its value, e.g. `parallel.schedule`.
        name: the unknown name.
        allowed: the names of the registry, in the order of the message.
    """
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key} = {name!r}: allowed are {', '.join(map(repr, names))}{hint}"
