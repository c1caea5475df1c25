"""The help pages of the commands: their examples, and how they look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import typer

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "holdfast": (
        "holdfast plan run.toml",
        "holdfast train run.toml --set train.steps=1000",
    ),
    "train": (
        "holdfast train run.toml",
        "holdfast train run.toml --nproc 4 --out runs/first --set optimizer.lr=1e-3",
        "holdfast train run.toml --out runs/tuned --resume start",
        "torchrun --nproc-per-node 8 -m holdfast.trainer run.toml",
    ),
    "resume": (
        "holdfast resume runs/run-1",
        "holdfast resume runs/run-1 --set train.steps=2000",
    ),
    "replay": ("holdfast replay runs/run-1",),
    "join": ("holdfast join runs/run-1 --ranks 2",),
    "plan": (
        "holdfast plan run.toml --set parallel.pipeline=4",
        "holdfast plan run.toml --lost 2,5-7",
        "holdfast plan run.toml --tflops 400 --gbytes 50",
    ),
    "check": ("holdfast check run.toml --set parallel.tensor=2",),
    "data prepare": (
        "holdfast data prepare corpus --output tokens --tokenizer tokenizer.json",
        "holdfast data prepare a.jsonl b.jsonl --output tokens --json-key content",
    ),
    "chaos": (
        "holdfast chaos runs/run-1",
        "holdfast chaos runs/run-1 --rank 2 --step 50 --phase reduce",
        "holdfast chaos runs/run-1 --every 30 --count 0",
    ),
    "rewind": (
        "holdfast rewind runs/run-1 --steps 5 --without 381",
        "holdfast rewind runs/run-1 --steps 100 --without 12,381",
    ),
    "report": ("holdfast report runs/run-1 --text",),
    "health": (
        "holdfast health",
        "holdfast health run.toml --out /shared/runs/first --json",
        "srun --ntasks-per-node 1 holdfast health --pairwise",
    ),
    "inspect": ("holdfast inspect runs/run-1 --tensors", "holdfast inspect start --json"),
    "verify": ("holdfast verify runs/run-1", "holdfast verify s3://bucket/run --json"),
    "diff": ("holdfast diff runs/run-1 runs/run-2",),
    "prove": ("holdfast prove runs/run-1/checkpoints/step-00000050 runs/run-1",),
    "bisect": (
        "holdfast bisect runs/run-1 runs/run-2",
        "holdfast bisect runs/run-1 runs/run-2 --only-compare --json",
    ),
    "audit": (
        "holdfast audit runs/run-1 --steps 41:50",
        "holdfast audit runs/run-1 --steps 41:50 --set parallel.pipeline=2",
    ),
    "convert": (
        "holdfast convert runs/run-1 model --to hf",
        "holdfast convert Llama-folder start --to holdfast",
        "holdfast convert lit_model.pth start --to holdfast --map rules.toml --value heads=32",
    ),
    "generate": (
        'holdfast generate runs/run-1 --prompt "Once upon a time"',
        "holdfast generate Llama-folder --prompt-file a.txt --temperature 0.8 --samples 4 --seed 7",
        "holdfast generate runs/run-1 --prompt-file prompt.txt --json",
    ),
    "evaluate": (
        "holdfast evaluate runs/run-1",
        "holdfast evaluate runs/run-1/checkpoints/step-00000050 --text book.txt --text web.jsonl",
        "holdfast evaluate Llama-folder --text book.txt --context 2048 --stride 512 --json",
        "holdfast evaluate Llama-folder --data run.toml",
        "holdfast evaluate runs/run-1 --tasks hellaswag,arc_easy",
    ),
}
"""By command: lines to type."""


def epilog(command: str) -> str:
    """The end of a command's help page."""
    return "\n".join(("[dim]Examples:[/dim]", *EXAMPLES[command]))


def shown_alone(context: typer.Context) -> None:
    """Show the help page of a group of commands that is called without one."""
    if context.invoked_subcommand is None:
        context.get_help()  # prints it


def tidy(parser: Any, above: Any = None) -> None:
    """Have flags shown without a type, and paragraphs as such, in a command and those below it.

    Args:
        parser: a command as typer's parser has it.
        above: the context of the group that it is in.
    """
    context = parser.make_context(
        parser.name, [], parent=above, resilient_parsing=True, **parser.context_settings
    )
    parser.help = "\n\n".join(" ".join(part.split()) for part in parser.help.split("\n\n"))
    for parameter in parser.get_params(context):
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    for below in getattr(parser, "commands", {}).values():
        tidy(below, context)
