"""`holdfast health`: whether this node, or all nodes of a job, are fit to take part in a run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import ConfigError, printable
from holdfast.parallel.output import plain_console, say
from holdfast.trainer.config import load_config
from holdfast.trainer.run import RunDirectory, checkpoint_root, job_secret
from holdfast.trainer.worlds import WorldInfo, world_from_environment

if TYPE_CHECKING:
    from holdfast.launch.health import JobReport, NodeSettings

_NO_MEMORY = 1 << 20
_DISK_STEP = 4


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=epilog("health"))(health)


def health(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="The run whose operations, disks and checkpoints are meant; without it a small "
            "model's operations, and the disk of --path.",
            metavar="CONFIG.toml",
            show_default=False,
        ),
    ] = None,
    pairwise: Annotated[
        bool,
        typer.Option(
            "--pairwise",
            help="Under torchrun, srun or mpirun: all nodes of the job, and their links in pairs.",
        ),
    ] = False,
    rounds: Annotated[
        int,
        typer.Option(help="Partners of each node with --pairwise; 0: all others.", min=0),
    ] = 2,
    path: Annotated[
        list[Path],
        typer.Option("--path", help="A folder whose disk is measured; may be repeated."),
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder, with CONFIG.toml.", metavar="RUN"),
    ] = None,
    memory_mib: Annotated[
        int, typer.Option(help="Memory of each device to test; 0: none.", min=0, max=_NO_MEMORY)
    ] = 256,
    disk_mib: Annotated[
        int,
        typer.Option(help="What is written to each disk and read again; 0: nothing.", min=0),
    ] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of CONFIG.toml."),
    ] = [],  # noqa: B006
) -> None:
    """Look at memory, products, disks, clocks, versions and links of a node, or of all of a job.

    Exit code: 0 all is well, 1 a check has failed, 2 wrong arguments, 3 a process of the job cannot
    be reached.
    """
    settings = _settings(config, overrides, path, out)
    disk_mib = -(-disk_mib // _DISK_STEP) * _DISK_STEP
    settings = replace(settings, memory_mib=memory_mib, disk_mib=disk_mib)
    world = world_from_environment(os.environ) if pairwise else None
    if pairwise and world is None:
        raise ConfigError(
            "--pairwise looks at all nodes of a job: start it by torchrun, srun or mpirun, as a "
            "process on each node"
        )
    is_well, report = _alone(settings) if world is None else _job(world, settings, rounds, out)
    if report is not None:
        _show(report, as_json=as_json, launched=world is not None)
    raise typer.Exit(0 if is_well else 1)


def _settings(
    path: Path | None, overrides: list[str], folders: list[Path], out: Path | None
) -> NodeSettings:
    """What is looked at: a run's operations and folders, and others."""
    from holdfast.launch.health import NodeSettings, folders_of

    if path is None and (overrides or out is not None):
        raise ConfigError("--set and --out belong to a run: name its CONFIG.toml")
    named = {str(folder): folder for folder in folders}
    if path is None:
        return NodeSettings(folders=named)
    config = load_config(path, overrides)
    root = RunDirectory(out or Path()).root
    own = folders_of(config, root, checkpoint_root(root, config))
    return NodeSettings(config, {**own, **named})


def _alone(settings: NodeSettings) -> tuple[bool, JobReport]:
    from holdfast.launch.health import JobReport, check_node

    report = JobReport((check_node(settings),))
    return report.passed, report


def _job(
    world: WorldInfo, settings: NodeSettings, rounds: int, out: Path | None
) -> tuple[bool, JobReport | None]:
    from holdfast.launch.health import check_job

    if world.job:  # torchrun's own store has no secret
        world = replace(world, secret=job_secret(os.environ, out))
    return check_job(world, settings, rounds)


def _show(report: JobReport, *, as_json: bool, launched: bool) -> None:
    """Print a report: as JSON, or as tables.

    Args:
        launched: whether a launcher has started this process: a terminal is then that launcher's.
    """
    if as_json:
        say(report.to_json().decode())
        return
    from holdfast.launch.health import rows_of

    console = plain_console(terminal=False if launched else None)
    table = Table(box=None, padding=(0, 1))
    for column in ("node", "check", "value", "limit", "result"):
        table.add_column(column, overflow="fold")
    for row in rows_of(report.nodes):
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    if report.links:
        links = Table(box=None, padding=(0, 1))
        for column in ("round", "link", "MB/s", "ms", "result"):
            links.add_column(column, overflow="fold")
        for link in report.links:
            links.add_row(
                str(link.round),
                Text(printable(" - ".join(link.nodes))),
                f"{link.bytes_per_s / 1e6:,.4g}",
                f"{1e3 * link.latency_s:,.3g}",
                "ok" if link.passed else Text(printable(f"FAILED: {link.reason}")),
            )
        console.print(links)
    for line in report.verdict():
        say(printable(line))
