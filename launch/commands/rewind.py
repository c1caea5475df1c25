"""`holdfast rewind RUN`: steps are taken back, and the run goes on without some samples."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import say
from holdfast.trainer.config import RunConfig, load_config
from holdfast.trainer.run import RunDirectory, at_rest, is_locked, read_events
from holdfast.trainer.saves import MOST_SAMPLES, RewindRequest, ask, take_back_stopped

_POLL_S = 0.1


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=epilog("rewind"))(rewind)


def rewind(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")],
    steps: Annotated[int, typer.Option(help="How many steps to take back.", min=1)],
    without: Annotated[
        str,
        typer.Option(
            help="The numbers of samples to go on without, as 12,381.", metavar="SAMPLE,..."
        ),
    ] = "",
) -> None:
    """Take the last steps of a run back, and have it go on without some samples.

    A run that is under way does it from memory (elastic.rewind), in the course of its next step. A
    run that has ended or stopped goes on from a checkpoint, with holdfast resume.
    """
    run = RunDirectory(folder)
    if not run.config.is_file():
        raise ConfigError(f"{folder} has no config.toml, so it is not the folder of a run")
    config, samples = load_config(run.config, []), _numbers(without)
    if is_locked(folder):
        raise typer.Exit(_ask(run, config, steps, samples))
    with at_rest(folder, config):
        say(take_back_stopped(run, config, steps, samples))
    say(f"go on with: holdfast resume {folder}")


def _numbers(given: str) -> list[int]:
    """The numbers of samples in an option's value."""
    parts = [part.strip() for part in given.split(",")] if given.strip() else []
    wrong = next((part for part in parts if not (part.isascii() and part.isdigit())), None)
    if wrong is not None or len(parts) > MOST_SAMPLES:
        said = f"{wrong!r} is no number" if wrong is not None else f"{len(parts)} numbers"
        raise ConfigError(
            f"--without {given[:80]}: {said}; name up to {MOST_SAMPLES} samples by number, as "
            "12,381 (the event of a spike names them)"
        )
    return sorted(set(map(int, parts)))


def _ask(run: RunDirectory, config: RunConfig, steps: int, samples: list[int]) -> int:
    """Ask a run that is under way. Returns the exit code: 1 if it could not do it."""
    depth = config.elastic.rewind
    if steps > depth:
        raise ConfigError(
            f"--steps {steps}: {run.root} is under way with elastic.rewind = {depth}, the steps "
            "that it can take back from memory; take fewer back, or stop it and run this again"
        )
    if run.rewind_request.exists():
        raise ConfigError(f"{run.rewind_request} is there: another request waits for its answer")
    request = RewindRequest(secrets.token_hex(7), steps, samples)
    name = f"{int(request.name, 16):x}"
    try:
        ask(run.rewind_request, request)
    except OSError as error:
        raise ConfigError(f"{run.rewind_request} cannot be written: {error.strerror}") from error
    while is_locked(run.root):
        for event in _answers(run, name):
            say(event["message"])
            return 0 if event["event"] == "rewound" else 1
        time.sleep(_POLL_S)
    run.rewind_request.unlink(missing_ok=True)
    raise ConfigError(f"{run.root} ended before it took the steps back; run this again")


def _answers(run: RunDirectory, name: str) -> Iterator[dict[str, Any]]:
    for event in read_events(run.events):
        if event.get("request") == name and event["event"] in ("rewound", "not_rewound"):
            yield event
