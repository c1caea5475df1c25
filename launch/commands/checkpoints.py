"""`holdfast inspect`, `verify`, `diff` and `prove`: the commands on checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from holdfast.checkpoint.format import local_path
from holdfast.checkpoint.stores import checkpoint_at, find_checkpoint
from holdfast.checkpoint.tools import Summary, inspect_checkpoint
from holdfast.launch.commands.progress import shown_progress
from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import HoldfastError, Unanswered, Unreadable, printable, size_text
from holdfast.parallel.layout import AXES, Mesh
from holdfast.parallel.output import plain_console, say, tell

Checkpoint = Annotated[
    str,
    typer.Argument(help="A checkpoint, a folder of them, or a run; a path or URL.", metavar="PATH"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (inspect, verify, diff, prove):
        app.command(epilog=epilog(command.__name__))(command)


@contextlib.contextmanager
def _answering(*, damage_is_an_answer: bool = False) -> Iterator[None]:
    """Have a command that gets no answer end with another code than one whose answer is no.

    Raises:
        Unanswered: a checkpoint is not there, cannot be read, or is damaged.
    """
    try:
        yield
    except HoldfastError as error:
        is_answer = damage_is_an_answer and not isinstance(error, Unreadable)
        if is_answer or error.exit_code != HoldfastError.exit_code:
            raise
        raise Unanswered(str(error)) from error
    except OSError as error:
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        raise Unanswered(f"{place}{error.strerror or error}") from error
    except MemoryError as error:
        raise Unanswered("there is not enough memory") from error


def inspect(
    path: Checkpoint,
    as_json: AsJson = False,
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = True,
) -> None:
    """Show what is in a checkpoint: tensors, sizes, where they lie, how the run went on."""
    with _answering():
        summary = inspect_checkpoint(find_checkpoint(path).place)
    if as_json:
        say(json.dumps(summary.as_dict(), indent=2))
        return
    console = plain_console()
    console.print(_overview(summary))
    if tensors:
        console.print(_tensor_table(summary))


def _overview(summary: Summary) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(summary.created))
    rows = [
        ("checkpoint", summary.path),
        ("step", str(summary.step)),
        ("saved", created),
        ("size", f"{size_text(summary.bytes)} in {len(summary.files)} files"),
        ("parameters", f"{summary.parameters:,}"),
        ("saved by", _layout(summary.layout)),
        ("scalars", ", ".join(f"{key} {value}" for key, value in summary.scalars.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in summary.versions.items())),
    ]
    for kind, found in summary.kinds.items():
        dtypes = ", ".join(found["dtypes"])
        rows.append((kind, f"{found['tensors']} tensors, {size_text(found['bytes'])}, {dtypes}"))
    for name, value in rows:
        if value:
            table.add_row(name, printable(value))
    return table


def _layout(keys: Mapping[str, Any]) -> str:
    """A run's section `parallel` in a few words; empty where a checkpoint has none."""
    if not keys:
        return ""
    mesh = Mesh.of(**{axis: keys[axis] for axis in AXES if axis in keys})
    return f"{mesh.text} x virtual {keys.get('virtual', 1)}"


def _tensor_table(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 1))
    for column in ("tensor", "dtype", "shape"):
        table.add_column(column, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("chunks", justify="right")
    table.add_column("files", justify="right")
    for tensor in summary.tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(
            printable(tensor.name),
            tensor.dtype,
            shape,
            size_text(tensor.bytes),
            str(tensor.chunks),
            str(len(tensor.files)),
        )
    return table


def verify(
    path: Checkpoint,
    rebuild: Annotated[
        bool, typer.Option(help="Make a lost or damaged manifest anew from the files' headers.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint against its checksum, and the files against the manifest.

    Exit code: 0 all is as it was written, 1 it is damaged, 2 there is none or it cannot be read.
    """
    from holdfast.checkpoint.tools import rebuild_manifest, verify_checkpoint

    with _answering(damage_is_an_answer=True):
        if rebuild:
            made = rebuild_manifest(local_path(path, "PATH"))
            (tell if as_json else say)(
                f"{path}: made a manifest of {len(made.tensors)} tensors in {len(made.files)} "
                "files; the run's configuration is not in it"
            )
        else:
            path = find_checkpoint(path).place
        began = time.perf_counter()
        with shown_progress("reading") as progress:
            problems = verify_checkpoint(path, progress)
        seconds = time.perf_counter() - began
        size = checkpoint_at(path).manifest().bytes
    if as_json:
        found = [
            {"file": p.file, "message": p.message, "tensor": p.tensor, "box": p.box}
            for p in problems
        ]
        say(json.dumps({"path": path, "ok": not problems, "problems": found}, indent=2))
    elif problems:
        for problem in problems:
            say(f"{path}/{problem}")
    else:
        say(f"{path}: all {size_text(size)} are as they were written ({seconds:.1f} s)")
    is_open = all(problem.is_unread for problem in problems)
    raise typer.Exit(0 if not problems else Unanswered.exit_code if is_open else 1)


def diff(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints bit for bit, whatever layouts they were saved in.

    Exit code: 0 they are the same, 1 they differ, 2 one is not there, damaged or cannot be read.
    """
    from holdfast.checkpoint.tools import diff_checkpoints

    with _answering():
        places = find_checkpoint(first).place, find_checkpoint(second).place
        with shown_progress("comparing") as progress:
            found = diff_checkpoints(*places, progress)
    if as_json:
        say(json.dumps(found.as_dict(), indent=2))
        raise typer.Exit(0 if found.equal else 1)
    for label, names in (("only in A", found.only_first), ("only in B", found.only_second)):
        for name in names:
            say(f"{label}: {name}")
    for line in found.other_form:
        say(f"of another form: {line}")
    for key in found.other_values:
        say(f"of another value: {key}")
    if found.values:
        table = Table(box=None, padding=(0, 1))
        table.add_column("tensor", overflow="fold")
        for column in ("differing", "of", "largest", "relative"):
            table.add_column(column, justify="right")
        for value in found.values:
            table.add_row(
                printable(value.name),
                f"{value.differing:,}",
                f"{value.elements:,}",
                f"{value.largest:.3g}",
                f"{value.relative:.3g}",
            )
        plain_console().print(table)
    steps = (
        ""
        if found.steps[0] == found.steps[1]
        else f" (steps {found.steps[0]} and {found.steps[1]})"
    )
    say(
        f"identical: {found.compared} tensors, bit for bit{steps}"
        if found.equal
        else f"different: {len(found.values)} of {found.compared} tensors{steps}"
    )
    raise typer.Exit(0 if found.equal else 1)


def prove(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Train in another layout, say."),
    ] = [],  # noqa: B006
) -> None:
    """Train from checkpoint A to B's step again, and show that the result is B, bit for bit.

    Exit code: 0 it is, 1 it is not, 2 one is not there, damaged or cannot be read.
    """
    from holdfast.launch.proofs import prove_checkpoints

    with _answering():
        found = prove_checkpoints(
            find_checkpoint(first).place, find_checkpoint(second).place, overrides
        )
    start, end = found.steps
    if found.difference.equal:
        say(
            f"proved: training {end - start} steps from {first} gives {second}, all "
            f"{found.difference.compared} tensors bit for bit"
        )
        raise typer.Exit(0)
    worst = found.difference.values[0].name if found.difference.values else "tensors are missing"
    say(
        f"not proved: {len(found.difference.values)} of {found.difference.compared} tensors differ "
        f"after {end - start} steps, first {worst}"
    )
    raise typer.Exit(1)
