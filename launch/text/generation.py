"""The continuation of prompts, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from holdfast.launch.text.decoding import MOST_TOGETHER, End, Limits, continued
from holdfast.launch.text.opening import TextForm, TextModel
from holdfast.launch.text.sampling import Sampling
from holdfast.launch.text.tokens import TextStream
from holdfast.parallel.errors import ConfigError, first_line


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, as the model has it."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """One continuation of a prompt."""

    prompt: int
    """The number of the prompt, from 0."""
    sample: int
    text: str
    """The continuation alone."""
    tokens: tuple[int, ...]
    end: End


Heard = Callable[[int, int, str], None]
"""Called with (prompt, sample, text) when there is more text of a sample."""


def encode_prompts(
    texts: Sequence[str], form: TextForm, *, vocab: int, context: int
) -> list[Prompt]:
    """The prompts as tokens; an empty one is the token that stands before texts. Pure.

    Raises:
        ConfigError: one has no token, is too long, or has a token that the model lacks.
    """
    found = []
    for text in texts:
        ids = form.tokenizer.encode(text)
        if not ids and form.before is not None:
            ids = [form.before]
        shown = first_line(ValueError(text))[:40]
        if not ids:
            raise ConfigError(
                "the prompt is empty, and no token is known that stands before texts; give a prompt"
            )
        if len(ids) >= context:
            raise ConfigError(
                f"the prompt {shown!r}… has {len(ids)} tokens, and the model's sequences have "
                f"{context} at most, with at least one new token; shorten it"
            )
        if max(ids) >= vocab:
            raise ConfigError(
                f"the prompt {shown!r}… has token {max(ids)}, and the model knows tokens 0 to "
                f"{vocab - 1}; its tokenizer is another one"
            )
        found.append(Prompt(text, tuple(ids)))
    return found


def generate(
    model: TextModel,
    form: TextForm,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    tokens: int,
    samples: int,
    context: int,
    heard: Heard = lambda prompt, sample, text: None,
) -> Iterator[GeneratedText]:
    """Continue each prompt `samples` times. Local.

    The text of a sample is a function of the model, the prompt, the sampling and the sample's
    number, and of how many samples are computed together.

    Args:
        tokens: the most new tokens of a text.
        context: the longest sequence of the model.
    """
    limits = Limits(tokens, context, form.ends, form.tokenizer.vocab)
    for number, prompt in enumerate(prompts):
        for first in range(0, samples, MOST_TOGETHER):
            together = range(first, min(samples, first + MOST_TOGETHER))
            streams = {one: TextStream(form.tokenizer, list(prompt.ids)) for one in together}
            add = partial(_add, streams, partial(heard, number))
            found = continued(
                model.chunk,
                model.section.kv_heads,
                model.device,
                prompt.ids,
                together,
                sampling,
                limits,
                add,
            )
            for one in found:
                stream = streams[one.sample]
                heard(number, one.sample, stream.rest())
                assert one.end is not None
                yield GeneratedText(number, one.sample, stream.text, tuple(one.tokens), one.end)


def _add(
    streams: Mapping[int, TextStream], heard: Callable[[int, str], None], sample: int, token: int
) -> None:
    """Append a token to the text of a sample, and tell what became readable."""
    if text := streams[sample].add(token):
        heard(sample, text)
