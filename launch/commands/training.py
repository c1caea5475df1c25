"""The commands of a run: `train`, `resume`, `replay`, `join`, `plan`, `check`, `data prepare`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.checkpoint.format import local_path
from holdfast.launch.commands.progress import shown_progress
from holdfast.launch.help_pages import epilog, shown_alone
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import outlive_readers, plain_console, say, tell, unwind_when_told
from holdfast.trainer.config import (
    allowed_changes,
    config_notes,
    known_keys,
    load_config,
    require_elastic,
)
from holdfast.trainer.run import (
    RunDirectory,
    RunRequest,
    begin_to_hear,
    described,
    job_secret,
    load_run_config,
    measure_throughput,
    opened_run,
    require_processes,
    with_throughput,
)
from holdfast.trainer.worlds import WorldInfo, world_from_environment

if TYPE_CHECKING:
    from holdfast.trainer.config import RunConfig
    from holdfast.trainer.data import Coverage

_MOST_GIVEN_BYTES = 1 << 20
"""The largest configuration that standard input may give."""


def _given(context: typer.Context, path: Path) -> Path:
    """The file of a configuration; "-" is standard input, which can then be read again.

    A run with a compact heap starts its process again, which reads it once more.
    """
    if str(path) != "-" or context.resilient_parsing:  # a shell completes the line
        return path
    held = os.memfd_create("configuration")
    os.write(held, sys.stdin.buffer.read(_MOST_GIVEN_BYTES + 1))
    os.lseek(held, 0, os.SEEK_SET)
    os.dup2(held, 0)
    os.close(held)
    return Path("/dev/stdin")


def _keys(incomplete: str) -> list[str]:
    """The keys of the configuration that a shell offers after --set."""
    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


def _unset(text: str, **keys: Any) -> Any:
    """An option whose default of 0 stands for its absence, and is not shown."""
    return typer.Option(help=text, show_default=False, **keys)


Config = Annotated[
    Path,
    typer.Argument(
        help="The run's TOML file; - is standard input.", metavar="CONFIG.toml", callback=_given
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a key; may be repeated.",
        autocompletion=_keys,
    ),
]


AllowChange = Annotated[
    list[str],
    typer.Option(
        "--allow-change",
        metavar="KEY,...",
        help="Go on although these keys differ from the checkpoint's; may be repeated.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (train, resume, replay, join, plan, check):
        app.command(epilog=epilog(command.__name__))(command)
    data = typer.Typer(
        invoke_without_command=True, callback=shown_alone, help="Work with training data."
    )
    data.command(epilog=epilog("data prepare"))(prepare)
    app.add_typer(data, name="data")


def train(
    config: Config,
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Workers on this machine: the layout's, or as many replicas as make them up if "
            "the configuration does not set parallel.data.",
            metavar="WORKERS",
            min=1,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder; by default runs/NAME-N.", metavar="RUN"),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(help="auto, best, none, or the path of a checkpoint.", metavar="CHECKPOINT"),
    ] = "auto",
    allow_change: AllowChange = [],  # noqa: B006
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Then train again without faults, and compare every step bit by bit."
        ),
    ] = False,
    from_hf: Annotated[
        Path | None,
        typer.Option(
            "--from-hf",
            help="Begin with the weights of a Hugging Face folder, which gives the keys of [model] "
            "that are not set: the same as --set model.from_hf=FOLDER.",
            metavar="FOLDER",
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer takes the default as it stands)
) -> None:
    """Train. Starts its own workers; under torchrun, srun or mpirun it is one worker.

    With elastic.enabled, a task of srun or mpirun is the agent of a node, and starts that node's
    workers.
    """
    outlive_readers()
    begin_to_hear()
    if from_hf is not None:
        overrides = [*overrides, f"model.from_hf={json.dumps(str(from_hf))}"]
    loaded = load_run_config(config, overrides, workers=nproc)
    request = RunRequest(config, loaded, out, resume, allowed_changes(allow_change, loaded))
    raise typer.Exit(_start(request, nproc, prove=prove))


def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="RUN")],
    allow_change: AllowChange = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Go on with a run, by the configuration in its folder."""
    outlive_readers()
    begin_to_hear()
    directory = RunDirectory(run)
    if not directory.config.is_file():
        raise ConfigError(
            f"{run} has no config.toml, so it is not the folder of a run; name one, or begin with "
            "holdfast train CONFIG.toml"
        )
    loaded = load_run_config(directory.config, overrides)
    allowed = allowed_changes(allow_change, loaded)
    raise typer.Exit(_start(RunRequest(directory.config, loaded, run, allow_change=allowed)))


def _start(request: RunRequest, nproc: int | None = None, *, prove: bool = False) -> int:
    """Train as what this process is: a command, a worker, or the agent of a task."""
    world = world_from_environment(os.environ)
    if world is None:
        return _train_here(request, nproc, prove=prove)
    if world.job:
        world = replace(world, secret=job_secret(os.environ, request.out))
    if world.job and request.config.elastic.enabled:
        return _run_task(request, world)
    from holdfast.trainer import run_external_worker

    return run_external_worker(request, world)


def _train_here(request: RunRequest, nproc: int | None, *, prove: bool) -> int:
    """Train with workers that this command starts. Returns its exit code."""
    unwind_when_told()
    workers = nproc or request.config.parallel.ranks
    with opened_run(replace(request, world_size=workers, ranks_here=workers)) as opened:
        if opened.config.elastic.enabled:
            from holdfast.launch.launchers import run_elastic

            code = run_elastic(opened.config, opened.directory)
        else:
            from holdfast.launch.launchers import run_local

            code = run_local(opened.config, opened.directory, workers)
        if prove and code == 0:
            code = _compare_with_fault_free_run(opened.directory)
        return code


def _run_task(request: RunRequest, world: WorldInfo) -> int:
    """Run the agent of one task of srun or mpirun. Returns the command's exit code."""
    from holdfast.launch.launchers import run_first_task, run_other_task

    if world.rank:
        return run_other_task(request.config, world)
    ranks_here = world.local_world_size * request.config.parallel.ranks // world.world_size
    return run_first_task(replace(request, ranks_here=ranks_here), world)


def replay(
    run: Annotated[Path, typer.Argument(help="The folder of an elastic run.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to repeat it; by default RUN/replay.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Repeat a run's losses, departures and arrivals at the same steps on this machine.

    Compare the bits.
    """
    outlive_readers()
    begin_to_hear()
    unwind_when_told()
    require_elastic("holdfast replay")
    from holdfast.launch.proofs import describe_replay, replay_run

    code, found = replay_run(RunDirectory(run), local_path(out, "--out") if out else run / "replay")
    if found is None:
        raise typer.Exit(code)
    say(describe_replay(found))
    raise typer.Exit(0 if found.equal else 1)


def join(
    run: Annotated[Path, typer.Argument(help="The folder of an elastic run that is under way.")],
    ranks: Annotated[int, typer.Option(help="Workers to add on this machine.", min=1)] = 1,
) -> None:
    """Add this machine's workers to a run; SIGTERM lets them hand over and leave."""
    outlive_readers()
    begin_to_hear()
    unwind_when_told()
    require_elastic("holdfast join")
    from holdfast.launch.launchers import take_ranks

    require_processes(ranks, f"--ranks {ranks}")
    directory = RunDirectory(run)
    config = load_run_config(directory.config, []) if directory.config.exists() else None
    info, numbers = take_ranks(directory, ranks)
    from holdfast.launch.launchers import join_run

    config = config or load_run_config(directory.config, [])
    raise typer.Exit(join_run(directory, config, info, numbers))


def _compare_with_fault_free_run(run: RunDirectory) -> int:
    from holdfast.launch.proofs import (
        compare_runs,
        describe_comparison,
        lost_ranks,
        train_without_faults,
    )

    say("training again with nothing lost, to compare every bit ...")
    comparison = compare_runs(run, train_without_faults(run))
    say(describe_comparison(comparison, lost_ranks(run)))
    return 0 if comparison.equal else 1


def plan(
    config: Config,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tflops: Annotated[
        float, _unset("What a rank computes, in TFLOP/s; with --gbytes: a step time.")
    ] = 0.0,
    gbytes: Annotated[float, _unset("What a rank sends, in GB/s.")] = 0.0,
    drive_gbytes: Annotated[float, _unset("What a rank can write to offload.path, in GB/s.")] = 0.0,
    measure: Annotated[
        int,
        _unset(
            "Measure what a rank computes and writes with so many at once on this machine.",
            metavar="RANKS",
            min=0,
        ),
    ] = 0,
    lost: Annotated[
        str,
        typer.Option(
            help="Ranks, as 2,5-7: show the plan that follows their loss too.", metavar="RANKS"
        ),
    ] = "",
    ranks_per_node: Annotated[
        int, _unset("For the place of shadows; by default by local_nodes.", min=0)
    ] = 0,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Print layout, memory by rank, bubble, program and shadows, without starting a worker."""
    from holdfast.trainer.plan_report import plan_report

    for name, value in (("tflops", tflops), ("gbytes", gbytes), ("drive-gbytes", drive_gbytes)):
        if not 0 <= value <= _MOST_RATE:
            raise ConfigError(f"--{name} {value}: must be 0 (unknown) to {_MOST_RATE:g}")
    run_config = load_config(config, overrides)
    ranks = _ranks(lost, run_config.parallel.ranks)
    if measure:
        rates = measure_throughput(run_config, measure)
        (tell if as_json else say)(f"measured {described(rates)}")
        run_config = with_throughput(run_config, rates)
    for note in config_notes(run_config):
        tell(note)
    report = plan_report(
        run_config,
        flops_per_s=tflops * 1e12,
        link_bytes_per_s=gbytes * 1e9,
        drive_bytes_per_s=drive_gbytes * 1e9,
        ranks_per_node=ranks_per_node,
        lost=ranks,
        data=_data_of(run_config),
    )
    if as_json:
        say(json.dumps(report.as_dict(), indent=2))
    else:
        console = plain_console()
        console.print(report.renderable(console.width))


def _data_of(config: RunConfig) -> Coverage | None:
    """What is known of a run's data; None, with a note, if it is not on this machine."""
    from holdfast.trainer.data import known_coverage

    try:
        return known_coverage(config)
    except ConfigError as error:
        tell(f"note: the data cannot be looked at here: {error}")
        return None


_MOST_RATE = 1e9
"""TFLOP/s of a rank, or GB/s: more than there will be."""


def _ranks(text: str, count: int) -> list[int]:
    """The ranks in a text of numbers and ranges with commas between them.

    Args:
        count: the ranks of the layout.
    """
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()):
            raise ConfigError(f"--lost {text}: give ranks as 2 or 2,5-7")
        for number in (first, last):
            if len(number) > len(str(count)) or int(number) >= count:
                raise ConfigError(f"--lost {number}: the layout has ranks 0 to {count - 1}")
        if int(first) > int(last):
            raise ConfigError(f"--lost {part}: a range of ranks begins with the lower one")
        found.extend(range(int(first), int(last) + 1))
    return sorted(set(found))


def check(
    config: Config,
    steps: Annotated[int, typer.Option(help="Steps to replay.", min=1, max=1000)] = 3,
    certificate: Annotated[
        bool,
        typer.Option("--certificate", help="Print this machine's certificate, and check nothing."),
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Replay this layout at tiny size in float64 against one process; name what is wrong."""
    run_config = load_config(config, overrides)
    if certificate:
        from holdfast.launch.proofs import print_certificate

        print_certificate(run_config)
        return
    layout = run_config.parallel
    require_processes(layout.ranks, f"the layout {layout.mesh.text}")
    from holdfast.launch.proofs import check_layout

    raise typer.Exit(check_layout(run_config, steps))


def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help="UTF-8 files, JSON (.jsonl, .json), or folders of them.")
    ],
    output: Annotated[
        Path, typer.Option(help="Prefix of the .bin and .idx files.", metavar="PREFIX")
    ],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, or a tokenizer.json.", metavar="TOKENIZER")
    ] = "bytes",
    json_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="All inputs are JSON (lines, or an array of objects) with their text under this "
            'key; without it, files named .jsonl or .json are, and the key is "text". '
            '"" takes JSON as plain text.',
        ),
    ] = None,
    end_of_text: Annotated[
        str,
        typer.Option(
            metavar="TOKEN", help="The token that ends a document, if its name is not a usual one."
        ),
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
) -> None:
    """Write text as Megatron .bin/.idx, which `data.kind = "megatron"` reads."""
    from holdfast.trainer.data import prepare as write

    with shown_progress("tokenizing") as progress:
        made = write(
            [str(path) for path in inputs],
            local_path(output, "--output"),
            tokenizer,
            json_key=json_key,
            end_of_text=end_of_text,
            overwrite=overwrite,
            progress=progress,
        )
    say(
        f"{made.bin_path}, {made.idx_path}: {made.documents:,} documents, {made.tokens:,} tokens; "
        f"model.vocab is at least {made.vocab}"
    )
    if made.note:
        tell(f"warning: {made.note}")
