"""`holdfast report RUN --text`: what happened in a run, for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.launch.help_pages import epilog
from holdfast.launch.report import found_in, report_lines
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import say
from holdfast.trainer.run import RunDirectory


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=epilog("report"))(report)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    text: Annotated[bool, typer.Option("--text", help="Print the incidents in sentences.")] = False,
) -> None:
    """Tell what happened in runs: the losses, what noticed them, their cost, where ranks hung."""
    if not text:
        raise ConfigError("report writes no page yet; --text prints the incidents in sentences")
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise ConfigError(f"{folder} does not exist, or is no folder; name the folder of a run")
        if number:
            say("")
        for line in report_lines(found_in(RunDirectory(folder))):
            say(line)
