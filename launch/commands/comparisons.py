"""`holdfast bisect` and `audit`: the commands that compare runs by the digests of their steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import say, tell

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Train the steps again in another layout, say; by default it is one process.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (bisect, audit):
        app.command(epilog=epilog(command.__name__))(command)


def bisect(
    first: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="The folder of another.", metavar="B")],
    only_compare: Annotated[
        bool,
        typer.Option("--only-compare", help="Name the step by the digests; train nothing again."),
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Find the first step, operation and element in which two runs differ, whatever their layouts.

    Exit code: 0 they are the same, 1 they differ, 2 one is no run or cannot be compared.
    """
    from holdfast.launch.proofs import bisect_runs, describe_bisection
    from holdfast.trainer.run import RunDirectory

    found = bisect_runs(
        RunDirectory(first),
        RunDirectory(second),
        overrides,
        repeats=not only_compare,
        say=_said(as_json=as_json),
    )
    if as_json:
        plain = asdict(found)
        say(json.dumps({"equal": found.equal, **plain}, indent=2))
    else:
        for line in describe_bisection(found):
            say(line)
    raise typer.Exit(0 if found.equal else 1)


def audit(
    run: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="RUN")],
    steps: Annotated[str, typer.Option(help="The first and the last step.", metavar="A:B")],
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train steps of a run again, in any layout, and compare each with the run's digests.

    Exit code: 0 they are confirmed, 1 they are not, 2 it is no run or they cannot be trained again.
    """
    from holdfast.launch.proofs import audit_run, describe_audit
    from holdfast.trainer.run import RunDirectory

    if not (given := re.fullmatch(r"(\d{1,15}):(\d{1,15})", steps)):
        raise ConfigError(f"--steps {steps}: write two steps with a colon, as 41:50")
    _said(as_json=as_json)(f"steps {given[1]} to {given[2]} are trained again")
    found = audit_run(RunDirectory(run), int(given[1]), int(given[2]), overrides)
    if as_json:
        say(json.dumps({"confirmed": found.confirmed, **asdict(found)}, indent=2))
    else:
        for line in describe_audit(found):
            say(line)
    raise typer.Exit(0 if found.confirmed else 1)


def _said(*, as_json: bool) -> Callable[[str], None]:
    """Where progress is told: beside JSON, on the other stream."""
    return tell if as_json else say
