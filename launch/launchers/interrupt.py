"""What a person is told who has interrupted a run."""

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
        line = f"holdfast: {cause.message}: {command}"
    elif run.metrics.exists():
        line = (
            f"holdfast: ended at once, without a save; go on from the newest checkpoint: {command}"
        )
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
    if arguments[1:2] != ["train"]:
        return "the same command"
    kept: list[str] = []
    is_value = False
    for argument in arguments[1:]:
        if is_value or argument.startswith("--resume="):
            is_value = False
        elif argument == "--resume":
            is_value = True
        else:
            kept.append(argument)
    if not any(argument == "--out" or argument.startswith("--out=") for argument in kept):
        kept += ["--out", str(root)]
    return shlex.join(["holdfast", *kept])
