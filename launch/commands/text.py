"""`holdfast generate`: what a model makes of a prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.checkpoint.format import local_path
from holdfast.launch.help_pages import epilog
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import say, tell, write
from holdfast.parallel.reading import read_regular

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.launch.text import GeneratedText, Prompt

_MOST_GIVEN_BYTES = 1 << 26
"""The longest prompt that standard input may give."""

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint, a run (its newest one), or a Hugging Face folder; a path or URL.",
        metavar="MODEL",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu or cuda.",
        metavar="DEVICE",
        autocompletion=lambda: ["auto", "cpu", "cuda"],
    ),
]
Tokenizer = Annotated[
    str,
    typer.Option(
        help="bytes, or a tokenizer.json, in place of the model's.",
        metavar="TOKENIZER",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(epilog=epilog("generate"))(generate)


Prompts = Annotated[
    list[str], typer.Option("--prompt", metavar="TEXT", help="The text to continue; repeatable.")
]
PromptFiles = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE",
        help="A UTF-8 file with a text to continue, without its last line break; repeatable. "
        "Without any prompt, it is standard input.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        help="Scores are divided by it before tokens are drawn; by default 0, which takes the best "
        "token each time.",
        show_default=False,
    ),
]
TopK = Annotated[
    int, typer.Option(help="Draw from so many best tokens; by default all.", show_default=False)
]
TopP = Annotated[
    float, typer.Option(help="Draw from the best tokens that have this share of probability.")
]


def generate(
    model: Model,
    prompt: Prompts = [],  # noqa: B006  (typer takes the default as it stands)
    prompt_file: PromptFiles = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="The most new tokens of a text.", min=1)] = 100,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(help="Keys the draws.", show_default=False)] = 0,
    samples: Annotated[int, typer.Option(help="Texts for each prompt.", min=1)] = 1,
    tokenizer: Tokenizer = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text with a model; the same command gives the same text.

    A draw is a function of the seed, the sample's number and the token's place.
    """
    from holdfast.launch.text import (
        Sampling,
        choose_device,
        describe_model,
        encode_prompts,
        generate,
        load_model,
        text_form,
    )

    sampling = Sampling(temperature, top_k, top_p, seed)
    if samples > 1 and not temperature:
        raise ConfigError(
            f"--samples {samples} with --temperature 0: all would be the same text; set "
            "--temperature, to 0.8 say"
        )
    chosen, described = choose_device(device), describe_model(model)
    form = text_form(described.source, described.section, tokenizer)
    room, vocab = described.context, described.section.vocab
    prompts = encode_prompts(_prompts(prompt, prompt_file), form, vocab=vocab, context=room)
    context = min(room, tokens + max(len(one.ids) for one in prompts))
    loaded = load_model(described, chosen, context)
    writer = _Writer(len(prompts), samples, as_json)
    sizes = {"tokens": tokens, "samples": samples, "context": context}
    found = []
    for one in generate(loaded, form, prompts, sampling, heard=writer.heard, **sizes):
        writer.finished(one)
        found.append(one)
    if as_json:
        source = loaded.source
        answer = {"model": source.where, "step": source.step, "texts": _as_dicts(found, prompts)}
        say(json.dumps(answer, indent=2))


def _prompts(given: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The texts to continue: those given, then those of files; else standard input.

    Raises:
        ConfigError: a file cannot be read or is not UTF-8, or there is neither text nor input.
    """
    found = [*given, *map(_content, files)]
    if found:
        return found
    if sys.stdin.isatty():
        raise ConfigError(
            'there is nothing to continue: give --prompt "Once upon a time", or --prompt-file'
        )
    return [_decoded(sys.stdin.buffer.read(_MOST_GIVEN_BYTES), "standard input")]


def _content(file: Path) -> str:
    path = local_path(file, "--prompt-file")
    try:
        return _decoded(read_regular(path), f"--prompt-file {file}")
    except OSError as error:
        raise ConfigError(f"--prompt-file {file}: cannot be read: {error.strerror}") from error


def _decoded(content: bytes, where: str) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")


class _Writer:
    """Texts on standard output: one alone as it comes, others one after the other."""

    def __init__(self, prompts: int, samples: int, as_json: bool) -> None:
        self._quiet, self._several = as_json, prompts * samples > 1
        self._streams = not as_json and samples == 1
        self._begun = (-1, -1)
        """The last prompt and sample with a heading."""

    def heard(self, prompt: int, sample: int, text: str) -> None:
        """Write more of a text, if no other is written meanwhile."""
        if self._streams:
            self._head(prompt, sample)
            write(text)

    def finished(self, text: GeneratedText) -> None:
        """Write the end of a text, or all of it."""
        if self._quiet:
            return
        if not self._streams:
            self._head(text.prompt, text.sample)
            write(text.text)
        write("\n")
        if text.end == "context":
            tell(
                f"note: the text ends after {len(text.tokens)} tokens, as the model's sequences "
                "are no longer"
            )

    def _head(self, prompt: int, sample: int) -> None:
        if self._several and (prompt, sample) != self._begun:
            say(f"--- prompt {prompt + 1}, sample {sample + 1}")
            self._begun = (prompt, sample)


def _as_dicts(found: Sequence[GeneratedText], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompts[one.prompt].text,
            "sample": one.sample,
            "text": one.text,
            "tokens": list(one.tokens),
            "end": one.end,
        }
        for one in found
    ]
