"""`holdfast inspect`, `verify`, `diff` and `prove`: the commands on checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from holdfast.checkpoint.format import STATE, STATE_VERSION, local_path
from holdfast.checkpoint.stores import checkpoint_at, find_checkpoint
from holdfast.checkpoint.tools import Summary, inspect_checkpoint
from holdfast.launch.commands.progress import shown_progress
from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import HoldfastError, Unanswered, Unreadable, printable, size_text
from holdfast.parallel.layout import AXES, Mesh
from holdfast.parallel.output import say, tell

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
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor as well.")] = False,
) -> None:
    """Show what is in a checkpoint: kinds of tensors, sizes, the layout and versions that saved it.

    Exit code: 0, or 2 where there is none or it cannot be read.
    """
    with _answering():
        summary = inspect_checkpoint(find_checkpoint(path).place)
    if as_json:
        say(json.dumps(summary.as_dict(), indent=2))
        return
    for name, value in _overview(summary):
        say(printable(f"{name:<11} {value}"))
    if tensors:
        say("")
        for line in _tensor_lines(summary):
            say(line)


def _overview(summary: Summary) -> Iterator[tuple[str, str]]:
    """What a checkpoint is, as (name, value)."""
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(summary.created))
    scalars = {k: v for k, v in summary.scalars.items() if k not in (STATE, STATE_VERSION)}
    rows = [
        ("checkpoint", summary.path),
        ("step", str(summary.step)),
        ("saved", created),
        ("size", f"{size_text(summary.bytes)} in {len(summary.files)} files"),
        ("parameters", f"{summary.parameters:,}"),
        ("saved by", _layout(summary.layout)),
        ("state", ", ".join(map(" ".join, summary.state.items()))),
        ("scalars", ", ".join(f"{key} {value}" for key, value in scalars.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in summary.versions.items())),
    ]
    yield from ((name, value) for name, value in rows if value)
    for kind, found in summary.kinds.items():
        dtypes = ", ".join(found["dtypes"])
        yield kind, f"{found['tensors']} tensors, {size_text(found['bytes'])}, {dtypes}"


def _layout(keys: Mapping[str, Any]) -> str:
    """A run's section `parallel` in a few words; empty where a checkpoint has none."""
    if not keys:
        return ""
    mesh = Mesh.of(**{axis: keys[axis] for axis in AXES if axis in keys})
    return f"{mesh.text} x virtual {keys.get('virtual', 1)}"


def _tensor_lines(summary: Summary) -> Iterator[str]:
    """A line for each tensor, whole at any width: its name comes last."""
    rows = [("dtype", "shape", "size", "pieces", "files", "tensor")]
    rows += [
        (
            tensor.dtype,
            "x".join(map(str, tensor.shape)) or "scalar",
            size_text(tensor.bytes),
            str(tensor.chunks),
            str(len(tensor.files)),
            printable(tensor.name),
        )
        for tensor in summary.tensors
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for dtype, shape, *numbers, name in rows:
        cells = [dtype.ljust(widths[0]), shape.ljust(widths[1])]
        cells += [n.rjust(width) for n, width in zip(numbers, widths[2:], strict=True)]
        yield "  ".join([*cells, name])


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
    from holdfast.checkpoint.tools import (
        checkpoint_to_rebuild,
        rebuild_manifest,
        verify_checkpoint,
    )

    with _answering(damage_is_an_answer=True):
        if rebuild:
            folder, is_whole = checkpoint_to_rebuild(local_path(path, "PATH"))
            path = str(folder)
            note = f"{path}: its manifest is whole and stays as it is"
            if not is_whole:
                made = rebuild_manifest(folder)
                note = (
                    f"{path}: made a manifest of {len(made.tensors)} tensors in {len(made.files)} "
                    "files; the run's configuration is not in it"
                )
            (tell if as_json else say)(note)
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
    for value in found.values:
        say(
            f"of other values: {printable(value.name)}: {value.differing:,} of {value.elements:,} "
            f"elements, by {value.largest:.3g} at most; the difference's norm is "
            f"{value.relative:.3g} of A's"
        )
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
    if found.where is not None:
        say(f"the run's digests part from the repetition's at step {found.where.step}")
    say(
        f"not proved: {len(found.difference.values)} of {found.difference.compared} tensors differ "
        f"after {end - start} steps, first {worst}"
    )
    raise typer.Exit(1)
