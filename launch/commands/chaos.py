"""`holdfast chaos RUN`: faults in a run under way, at once, at a step, or again and again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import DiskWord, say, tell
from holdfast.parallel.schedules import FAULTS, STEP_PHASES
from holdfast.trainer.reports import EventFile, last_step
from holdfast.trainer.run import RunDirectory, read_events

if TYPE_CHECKING:
    from holdfast.elastic import Fault

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=epilog("chaos"))(chaos)


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker of a run on this machine."""

    rank: int
    incarnation: int
    pid: int


def living_workers(run: RunDirectory) -> list[Worker]:
    """The newest worker of each rank whose process lives on this machine. Local."""
    newest: dict[int, Worker] = {}
    for event in read_events(run.events):
        rank, incarnation, pid = event.get("rank"), event.get("incarnation", 0), event.get("pid")
        known = isinstance(rank, int) and isinstance(incarnation, int) and isinstance(pid, int)
        if known and event["event"] == "worker_started":
            newest[rank] = Worker(rank, incarnation, pid)
    return [worker for _, worker in sorted(newest.items()) if _is_of_holdfast(worker.pid)]


def _is_of_holdfast(pid: int) -> bool:
    """Whether the process lives and is a worker: its number may have been reused."""
    with contextlib.suppress(OSError):
        return b"holdfast" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """The faults that a person asks for."""

    kind: str
    rank: int | None
    """The rank; None: a random one each time."""
    step: int
    """The step, counted from 1, at which the worker causes the fault; 0: at once."""
    phase: str
    seconds: float
    """The seconds that the fault lasts, or by which the worker slows down."""
    factor: float
    """How many times as long a slow worker takes."""
    every_s: float
    """The approximate seconds between two faults."""
    count: int
    """The number of faults; 0: until the run ends."""
    seed: int
    """The seed of random choices; 0: a new one each time."""


def inject(run: RunDirectory, worker: Worker, request: FaultRequest) -> Fault:
    """Cause one fault in one worker, or ask the worker for it. Returns the fault."""
    from holdfast.elastic import ask_for, fault_from_data

    fault = fault_from_data(
        {
            "fault": request.kind,
            "rank": worker.rank,
            "step": request.step,
            "phase": request.phase,
            "seconds": request.seconds,
            "factor": request.factor,
            "incarnation": worker.incarnation,
        }
    )
    number = _SIGNALS.get(request.kind)
    if request.step or number is None:
        try:
            ask_for(run.chaos, fault)
        except OSError as error:
            raise ConfigError(f"{run.chaos} cannot be written: {error.strerror}") from error
        return fault
    events = EventFile(run.events, DiskWord(tell))
    events.append("fault_injected", fault=request.kind, rank=worker.rank, pid=worker.pid)
    events.close()
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(worker.pid, number)
        except PermissionError as error:
            told = f"rank {worker.rank} (process {worker.pid}) is another user's"
            raise ConfigError(f"{told}; run the command as that user") from error
    return fault


def faults(run: RunDirectory, request: FaultRequest) -> Iterator[Fault]:
    """Cause one fault, or one about every `every_s` seconds, up to `count` or the run's end."""
    rng = random.Random(request.seed or None)
    caused = 0
    while request.count == 0 or caused < request.count:
        living = living_workers(run)
        if not living:
            if caused:
                return
            raise ConfigError(f"no worker of {run.root} lives on this machine")
        found = [worker for worker in living if request.rank in (None, worker.rank)]
        if found:
            yield inject(run, rng.choice(found), request)
            caused += 1
        elif not request.every_s:
            raise ConfigError(
                f"rank {request.rank} of {run.root} has no worker on this machine now"
            )
        if request.count == 0 or caused < request.count:
            time.sleep(request.every_s * rng.uniform(0.5, 1.5))


def chaos(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")],
    fault: Annotated[
        str, typer.Option(help=", ".join(FAULTS), metavar="FAULT", autocompletion=lambda: FAULTS)
    ] = "kill",
    rank: Annotated[
        int | None, typer.Option(help="Which rank; by default a random one.", min=0)
    ] = None,
    step: Annotated[
        int, typer.Option(help="At which step; by default at once.", min=0, show_default=False)
    ] = 0,
    phase: Annotated[
        str,
        typer.Option(
            help=", ".join(STEP_PHASES), metavar="PHASE", autocompletion=lambda: STEP_PHASES
        ),
    ] = "compute",
    seconds: Annotated[float, typer.Option(help="How long, or how much slower.", min=0)] = 60.0,
    factor: Annotated[
        float, typer.Option(help="How many times as long a slow worker takes.", min=1)
    ] = 3.0,
    every: Annotated[
        float,
        typer.Option(help="Again about every so many seconds.", min=0, show_default=False),
    ] = 0.0,
    count: Annotated[int, typer.Option(help="How many faults; 0: until the run ends.", min=0)] = 1,
    seed: Annotated[
        int,
        typer.Option(help="Of what is chosen at random; by default a new one.", show_default=False),
    ] = 0,
) -> None:
    """Cause faults in a run that is going on, to see that it survives them."""
    run = RunDirectory(folder)
    if step and step <= (last := last_step(run.metrics)):
        raise ConfigError(f"--step {step} is over: the run has taken {last} steps")
    if count != 1 and not every:
        raise ConfigError(f"--count {count} needs --every SECONDS")
    request = FaultRequest(fault, rank, step, phase, seconds, factor, every, count, seed)
    for caused in faults(run, request):
        when = f" at step {caused.step}" if step else " in its next step"
        where = f"{when}, {caused.phase}" if step or fault not in _SIGNALS else ""
        say(f"{caused.fault}: rank {caused.rank}{where}")
