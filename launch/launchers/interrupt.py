"""The last words of a run that a person has interrupted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from holdfast.parallel.errors import Interrupted
from holdfast.parallel.output import ConsoleLog, tell
from holdfast.trainer.run import RankError, RunDirectory


def tell_interrupted(run: RunDirectory, cause: RankError | None, arguments: Sequence[str]) -> None:
    """Tell what is saved, and the command that goes on; nothing if no step was made.

    Args:
        cause: the reason for the end of the workers.
        arguments: those of this process, from its name on.
    """
    command = going_on(arguments, run.root)
    if cause is not None and cause.kind == Interrupted.__name__:
        line = f"holdfast: {cause.message}; to go on: {command}"
    elif run.metrics.exists():
        line = f"holdfast: ended at once, without a save; to go on: {command}"
    else:
        return
    tell(line)
    ConsoleLog(run.console_log).line(line)


def going_on(arguments: Sequence[str], root: Path) -> str:
    """The command that goes on with a run, as a shell takes it. Pure.

    Args:
        arguments: those of the command that was interrupted, from its name on.
        root: the run's folder.
    """
    if arguments[1:2] not in (["train"], ["resume"]):
        return "the same command"
    return shlex.join(["holdfast", "resume", str(root)])
