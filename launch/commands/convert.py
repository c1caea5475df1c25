"""`holdfast convert`: from any format of checkpoints to any other."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.checkpoint.convert import FLOATS, targets
from holdfast.checkpoint.format import local_path
from holdfast.launch.commands.progress import shown_progress
from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import say
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.run import require_processes
from holdfast.trainer.worlds import world_from_environment

if TYPE_CHECKING:
    from holdfast.checkpoint.convert import Converted

_DTYPES = {
    **{name: precision.stored for name, precision in PRECISIONS.items()},
    "fp16": "F16",
    "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
}
_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


Dtype = Annotated[
    str,
    typer.Option(
        help="Of the weights; by default as they are.",
        metavar="DTYPE",
        autocompletion=lambda: list(_DTYPES),
    ),
]

OtherWeights = Annotated[
    str,
    typer.Option(
        help="A kind of state in the weights' place: ema (see optimizer.ema).", metavar="KIND"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=epilog("convert"))(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="The checkpoint to read.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="A folder that is made.", metavar="DST")],
    to: Annotated[
        str,
        typer.Option(help=", ".join(targets()), metavar="FORMAT", autocompletion=targets),
    ],
    source_format: Annotated[
        str,
        typer.Option(
            "--from", help="The source's format; auto looks at the files.", metavar="FORMAT"
        ),
    ] = "auto",
    rules: Annotated[
        Path | None, typer.Option("--map", help="Rules for the source's tensors, a TOML file.")
    ] = None,
    value: Annotated[
        list[str],
        typer.Option(metavar="NAME=NUMBER", help="A value that rules use; may be repeated."),
    ] = [],  # noqa: B006
    model_files: Annotated[
        Path | None,
        typer.Option(help="A folder with config.json and tokenizer files for a source without."),
    ] = None,
    dtype: Dtype = "",
    weights: OtherWeights = "",
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    memory_limit: Annotated[
        str,
        typer.Option(
            help="For tensors under way, all processes together, as 512M or 2G.", metavar="BYTES"
        ),
    ] = "512M",
) -> None:
    """Convert a checkpoint to another format; after a kill the same command goes on."""
    from holdfast.checkpoint.convert import Conversion, convert as run

    if dtype and dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(_DTYPES)}")
    asked = Conversion(
        source=source,
        target=Path(os.path.abspath(local_path(target, "DST"))),
        to=to,
        source_format=source_format,
        dtype=_DTYPES[dtype] if dtype else "",
        rules=rules,
        values=dict(map(_value, value)),
        model_files=model_files,
        weights=weights,
        memory_bytes=parse_bytes(memory_limit),
    )
    require_processes(workers, f"--workers {workers}")
    world = world_from_environment(os.environ)
    rank, size = (0, 1) if world is None else (world.rank, world.world_size)
    with shown_progress("converting", threaded=False) as show:  # workers are forked
        converted = run(asked, workers=workers, rank=rank, world=size, progress=show)
    if converted is not None:
        for line in summary_lines(converted):
            say(line)


def parse_bytes(text: str) -> int:
    """A number of bytes: 512M, 2G, 1073741824.

    Raises:
        ConfigError: the text is not a number of bytes.
    """
    found = re.fullmatch(r"(\d{1,18}) ?([KMGT]?)(?:iB|B)?", text.strip())
    if found is None:
        raise ConfigError(f"--memory-limit {text}: give a number of bytes, as 512M or 2G")
    unit = _UNITS[found[2]]
    return int(found[1]) << (unit if found[2] else 0)


def _value(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not equals or not re.fullmatch(r"\d{1,18}", number.strip()):
        raise ConfigError(f"--value {text}: give NAME=NUMBER, as heads=32")
    return name.strip(), int(number)


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' * (count != 1)}"


def summary_lines(converted: Converted) -> list[str]:
    """The notes for a person on a finished conversion, one line each."""
    kinds = ", ".join(
        f"{_tensors(count)} of kind {kind}" for kind, count in converted.tensors.items()
    )
    rate = converted.bytes / max(converted.seconds, 1e-9)
    lines = [
        f"{converted.target} has step {converted.step} of the {converted.source_format} "
        f"checkpoint, {kinds}: {converted.bytes / 2**20:,.1f} MiB in {converted.seconds:.1f} s "
        f"({rate / 2**20:,.0f} MiB/s)"
    ]
    if converted.resumed_bytes:
        lines.append(
            f"went on after {converted.resumed_bytes / 2**20:,.1f} MiB that were written before"
        )
    if converted.scaled:
        lines += [
            f"scaled: {count} tensors from {source} to {target}, each element times the scale of "
            "its block, in 32 bits, rounded once"
            for (source, target), count in sorted(converted.rounded.items())
            if source.startswith("F8")
        ]
    lines += [
        f"rounded: {count} tensors from {source} to {target}, to nearest, half to even"
        if FLOATS[target] < FLOATS[source]
        else f"widened: {count} tensors from {source} to {target}, exactly"
        for (source, target), count in sorted(converted.rounded.items())
        if not (converted.scaled and source.startswith("F8"))
    ]
    lines += [
        f"read by the rule {rule}: {_tensors(count)}" for rule, count in converted.by_rule.items()
    ]
    reasons: dict[str, list[str]] = {}
    for name, why in converted.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        are = "is" if len(names) == 1 else f"and {len(names) - 1:,} more are"
        lines.append(f"{names[0]} {are} left out: {why}")
    lines.append(
        f"checked: every byte as written, and {converted.compared:,} values against the files of "
        "the source"
    )
    return lines
