"""The opening of a model for text: its description, its weights on a device, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from holdfast.checkpoint.loading import LoadTarget
from holdfast.checkpoint.model_config import read_config
from holdfast.launch.text.sources import (
    TRIES,
    ModelSource,
    described_model,
    find_model,
    is_gone,
    removed,
)
from holdfast.launch.text.tokens import (
    TextTokenizer,
    named_tokenizer,
    open_tokenizer,
    special_ids,
)
from holdfast.parallel.errors import CheckpointError, ConfigError, unknown_name
from holdfast.parallel.pipeline import Chunk
from holdfast.parallel.precision import PRECISIONS, Precision
from holdfast.parallel.reading import converted
from holdfast.trainer.config import RunConfig
from holdfast.trainer.models import (
    FAMILIES,
    ModelConfig,
    build_whole_model,
    family_of,
    in_use,
    layer_specs,
    serves_training_alone,
)


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model of which no weight is read yet."""

    place: str
    """The path or URL by which it was asked for."""
    source: ModelSource
    section: ModelConfig
    context: int
    """The longest sequence that it is made for, in tokens."""


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model on a device, whole, in one process."""

    source: ModelSource
    section: ModelConfig
    device: torch.device
    chunk: Chunk


def choose_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        ConfigError: there is no such one.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(unknown_name("--device", name, ("auto", "cpu", "cuda")))
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_model(place: str) -> ModelDescription:
    """The model at a path or URL. Local.

    Raises:
        ConfigError: there is no model, or it is none that is known here.
        CheckpointError: its description cannot be read.
    """
    source = find_model(place)
    section = in_use(model_section(source))
    of_run = 0 if source.run is None else source.run.train.seq_len
    return ModelDescription(place, source, section, max(section.max_seq_len, of_run))


def load_model(
    described: ModelDescription,
    device: torch.device,
    context: int,
    *,
    vocab_chunk: int = 0,
    like: RunConfig | None = None,
) -> TextModel:
    """A model with its weights on a device. Local.

    A run that goes on removes old checkpoints; a newer one of its is taken then.

    Args:
        context: the longest sequence that it will be given, in tokens.
        vocab_chunk: the vocabulary entries whose logits are in memory at once; 0: all.
        like: a run, as whose ranks the model computes, bit for bit; its constants count then.
    Raises:
        ConfigError: its weights have a type that is not computed with.
        CheckpointError: they cannot be read, are damaged, or are removed while they are read.
    """
    for left in reversed(range(TRIES)):
        try:
            return _loaded(described, device, context, vocab_chunk, like)
        except CheckpointError as error:
            if not is_gone(described.source):
                raise
            if not left:
                raise removed(described.source.where) from error
        with suppress(ConfigError):  # where it was named itself, and not its run
            described = describe_model(described.place)
    raise AssertionError


def _loaded(
    described: ModelDescription,
    device: torch.device,
    context: int,
    vocab_chunk: int,
    like: RunConfig | None,
) -> TextModel:
    source, section = described.source, described.section
    chunk = build_whole_model(
        section,
        dtype=precision_of_model(source).dtype,
        device=device,
        seq_len=context,
        micro_batch=1,
        seed=0,
        vocab_chunk=vocab_chunk if like is None else like.train.vocab_chunk,
        shards=1 if like is None else like.tensor_parts,
        strips=1 if like is None else like.numerics.tensor_strips,
        weights="unset",
        compiles=like is not None and like.train.compile,
    )
    fill_chunk(chunk, section, source)
    return TextModel(source, section, device, chunk)


def model_section(source: ModelSource) -> ModelConfig:
    """The [model] section of a model: the run's, or by the config.json.

    Raises:
        ConfigError: no family here computes what config.json describes.
    """
    if source.run is not None:
        return source.run.model
    return family_section(described_model(source), source.where)


def family_section(described: Mapping[str, Any], where: str) -> ModelConfig:
    """The [model] section of the model that a config.json describes.

    Raises:
        ConfigError: no family here computes it, or a key of it changes what is computed.
    """
    name = str(described.get("model_type"))
    family = family_of(name) if name in FAMILIES else None
    if family is None or family.section_of is None:
        raise ConfigError(f"{where}: {unknown_name('model_type', name, FAMILIES)}")
    try:
        found = {"family": name, **family.section_of(described)}
        known = {key: value for key, value in found.items() if value is not None}
        section = converted(msgspec.to_builtins(known), family.section)
    except ValueError as error:
        raise ConfigError(f"{where}: config.json: {error}") from error
    if unlike := [line for _, line in family.differences(section, described)]:
        raise ConfigError(f"{where}: {'; '.join(unlike[:3])}: it is not computed so here")
    return section


def precision_of_model(source: ModelSource) -> Precision:
    """The precision in which a model computes: that of its weights."""
    stored = {dtype for dtype, _ in source.weights.values()}
    found = [one for one in PRECISIONS.values() if {one.stored} == stored]
    if not found:
        allowed = ", ".join(one.stored for one in PRECISIONS.values())
        raise ConfigError(
            f"{source.where}: its weights are {', '.join(sorted(stored)) or 'missing'}; all must "
            f"be of one of the types {allowed}"
        )
    return found[0]


def fill_chunk(chunk: Chunk, section: ModelConfig, source: ModelSource) -> None:
    """Read the weights of a model into a chunk that is all of it.

    Raises:
        CheckpointError: the weights are not those of the section, or cannot be read.
    """
    check_weights(section, source.weights, source.where)
    targets: dict[str, list[LoadTarget]] = {}
    for (*_, spec), parameter in chunk.rows():
        memory = parameter.data[spec.local_row : spec.local_row + spec.rows]
        targets.setdefault(spec.name, []).append(LoadTarget(spec.box, memory))
    source.fill(targets)


def check_weights(
    section: ModelConfig, weights: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> None:
    """Check that the weights are those of a model, by name and shape.

    Raises:
        CheckpointError: one is missing, has another shape, or has no place in the model.
    """
    layers = layer_specs(
        section,
        tensor=1,
        sequence_parallel=False,
        seq_len=1,
        micro_batch=1,
        precision="fp32",
        recompute="none",
    )
    wanted = {row.name: tuple(row.shape) for layer in layers for row in layer.parameters[0]}
    problems = [
        f"{name} is {'missing' if name not in weights else 'of no use to it'}"
        for name in (*wanted, *weights)
        if (name in wanted) != (name in weights) and not serves_training_alone(section, name)
    ]
    problems += [
        f"{name} has shape {list(weights[name][1])}, and the model's has {list(shape)}"
        for name, shape in wanted.items()
        if name in weights and weights[name][1] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{where} does not hold the weights of the {section.family} model that it describes: "
            f"{'; '.join(problems[:3])}{more}"
        )


@dataclass(frozen=True, slots=True)
class TextForm:
    """How a model writes text: its tokenizer, and the tokens where texts begin and end."""

    tokenizer: TextTokenizer
    before: int | None
    """The token that stands before a text; None: there is none, or it is not known."""
    ends: frozenset[int]
    """The tokens that end a text."""


def text_form(source: ModelSource, section: ModelConfig, tokenizer: str = "") -> TextForm:
    """The form of a model's text.

    Args:
        tokenizer: "bytes" or the path of a tokenizer.json, in place of that of the folder.
    Raises:
        ConfigError: there is no tokenizer, or it has tokens that the model lacks.
    """
    of_run = source.run is not None
    if tokenizer:
        files, separator = named_tokenizer(tokenizer)
        before = after = [] if separator is None else [separator]
        found = open_tokenizer(files, f"--tokenizer {tokenizer}", adds_special_tokens=not of_run)
    else:
        described, files = described_model(source), source.files
        generation = read_config(files.get("generation_config.json", b"{}"))
        after = special_ids(generation, "eos_token_id") or special_ids(described, "eos_token_id")
        before = special_ids(described, "bos_token_id", "eos_token_id")
        found = open_tokenizer(files, source.where, adds_special_tokens=not of_run)
    return TextForm(found, before[0] if before else None, frozenset(after))
