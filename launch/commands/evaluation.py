"""`holdfast evaluate`: the loss of a model on held-out data and on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.launch.commands.progress import shown_progress
from holdfast.launch.commands.text import AsJson, Device, Model, Tokenizer
from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import say
from holdfast.trainer.config import load_config

if TYPE_CHECKING:
    import torch

    from holdfast.launch.text import ModelDescription, Score
    from holdfast.trainer.config import RunConfig

_LOGITS = 1 << 26
"""About so many scores of tokens are in memory at once."""
_MOST_CONTEXT = 2048
"""The context of text where none is given and the model is of no run, in tokens, at most."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=epilog("evaluate"))(evaluate)


Texts = Annotated[
    list[Path],
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text, JSON Lines, or a folder of them; repeatable, each has a score.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="CONFIG.toml",
        help="The held-out data and validation sets of this configuration; by default, those of "
        "the model's run.",
    ),
]

Tasks = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="Tasks of lm-eval (pip install 'holdfast[eval]').",
        show_default=False,
    ),
]
TaskFolder = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A folder with tasks of your own.")
]


def _unset(text: str) -> Any:
    """An option whose default of 0 stands for its absence, and is not shown."""
    return typer.Option(help=text, min=0, show_default=False)


def evaluate(
    model: Model,
    text: Texts = [],  # noqa: B006  (typer takes the default as it stands)
    data: Data = None,
    batches: Annotated[
        int, _unset("Global batches of held-out data; by default train.eval_batches.")
    ] = 0,
    context: Annotated[
        int, _unset("The most tokens of text that pass at once; by default as in training.")
    ] = 0,
    stride: Annotated[
        int, _unset("The tokens that count each time; by default half of the context.")
    ] = 0,
    batch: Annotated[
        int, typer.Option(help="Windows of text, or requests of tasks, at once.", min=1, max=4096)
    ] = 8,
    tasks: Tasks = "",
    task_folder: TaskFolder = None,
    tokenizer: Tokenizer = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Give a model's loss on held-out data or on text: nats a token, bits a byte, perplexities.

    Without --text and --data it is that of the run's own validation sets, as training logs it.
    """
    from holdfast.launch.text import TaskRequest, choose_device, describe_model, task_scores

    given = None if data is None else load_config(data)
    chosen = choose_device(device)
    described = describe_model(model)
    scores: list[Score] = []
    if text:
        length = _context(described, context)
        windows = (length, _stride(length, stride), batch)
        scores += _of_text(described, text, tokenizer, chosen, windows)
    if given is not None or not (text or tasks):
        scores += _of_data(described, given, batches, device)
    metrics = {}
    if tasks:
        asked = TaskRequest([name.strip() for name in tasks.split(",")], task_folder, batch)
        metrics = task_scores(described.source, asked, str(chosen))
    if as_json:
        source = described.source
        answer: dict[str, Any] = {"model": source.where, "step": source.step}
        answer["scores"] = [one.as_dict() for one in scores]
        if tasks:
            answer["tasks"] = metrics
        say(json.dumps(answer, indent=2))
        return
    for line in (*map(score_line, scores), *map(_task_line, metrics.items())):
        say(line)


def _task_line(task: tuple[str, dict[str, float]]) -> str:
    name, metrics = task
    return f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())


def score_line(score: Score) -> str:
    """A score for a person."""
    of_bytes = ""
    if score.bits_per_byte is not None:
        found = score.as_dict()["perplexity_per_byte"]
        of_bytes = f"; {score.bits_per_byte:.4f} bits a byte, perplexity {found:.4f}"
    counted = f"{score.tokens:,} tokens"
    if score.bytes is not None:
        counted += f", {score.bytes:,} bytes"
    return (
        f"{score.name}: {score.loss:.4f} nats a token, perplexity {score.perplexity:.4f}"
        f"{of_bytes} ({counted})"
    )


def _of_data(
    described: ModelDescription, given: RunConfig | None, batches: int, device: str
) -> list[Score]:
    """The scores on held-out data and on named validation sets."""
    from holdfast.launch.text import held_out_config, held_out_scores, load_like_run

    config = held_out_config(described, given)
    model = load_like_run(described, config, device)
    return held_out_scores(model, config, batches)


def _of_text(
    described: ModelDescription,
    paths: list[Path],
    tokenizer: str,
    device: torch.device,
    windows: tuple[int, int, int],
) -> list[Score]:
    """The scores on files and folders of text.

    Args:
        windows: the context, the stride, and the windows that are computed at once.
    """
    from holdfast.launch.text import load_model, text_form, text_score
    from holdfast.trainer.data import documents_in

    context, stride, together = windows
    form = text_form(described.source, described.section, tokenizer)
    chunk = max(1024, _LOGITS // (context * together))
    model = load_model(described, device, context, vocab_chunk=chunk)
    found = []
    for path in paths:
        documents = documents_in(str(path), key="--text")
        with shown_progress(path.name) as show:
            found.append(
                text_score(
                    model,
                    form,
                    str(path),
                    documents,
                    context=context,
                    stride=stride,
                    together=together,
                    progress=show,
                )
            )
    return found


def _context(described: ModelDescription, asked: int) -> int:
    if asked > described.context:
        raise ConfigError(
            f"--context {asked}: {described.source.where} takes {described.context} tokens at most"
        )
    run = described.source.run
    of_training = _MOST_CONTEXT if run is None else run.train.seq_len
    return asked or min(described.context, of_training)


def _stride(context: int, asked: int) -> int:
    if asked > context:
        raise ConfigError(f"--stride {asked}: use 1 to {context}, the context")
    return asked or -(-context // 2)
