"""A run's data in numbers: what it is, how much there is, and how often the run reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from holdfast.parallel.errors import DataError, size_text
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data.corpora import (
    DocumentStarts,
    TokenStream,
    known_text,
    list_documents,
    token_count,
)
from holdfast.trainer.data.dataset import Dataset
from holdfast.trainer.data.windows import split_part

_MANY_EPOCHS = 4.0
"""Up to here repeated text is about as good as new (Muennighoff et al. 2023)."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The data of a run, and how often the run reads it."""

    source: str
    """What is read, for a person."""
    sequences: int | None
    """The sequences of an epoch, those that are held out not counted; None: endless, or not known
    before the text is tokenised."""
    seq_len: int
    steps: int
    global_batch: int
    samples: int
    """The sequences that all steps read."""
    by_path: tuple[tuple[str, float], ...] = ()
    """With stages of a mixture: how often the run reads what each path names."""

    @property
    def epochs(self) -> float | None:
        """How often the run reads the data; None if `sequences` is."""
        return self.samples / self.sequences if self.sequences else None

    def line(self) -> str:
        """The data in a line for a person, with what is odd about its size."""
        if self.sequences is None or self.epochs is None:
            return self.source
        tokens = self.sequences * self.seq_len
        line = (
            f"{self.source}: {tokens:,} tokens to train on, in {self.sequences:,} sequences; "
            f"{self.steps:,} steps are {self.epochs:.3g} epochs"
        )
        if self.by_path:
            own = ", ".join(f"{epochs:.3g} of {path}" for path, epochs in self.by_path)
            line = f"{line} ({own})"
        if self.global_batch > self.sequences:
            return (
                f"{line}; one step of {self.global_batch:,} sequences reads the same text more "
                "than once: lower train.global_batch, or train on more text"
            )
        if self.epochs > _MANY_EPOCHS:
            return f"{line}; up to {_MANY_EPOCHS:g}, text teaches about as much as new text"
        return line

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        tokens = None if self.sequences is None else self.sequences * self.seq_len
        return {
            "source": self.source,
            "sequences": self.sequences,
            "tokens": tokens,
            "epochs": self.epochs,
            **({"epochs_by_path": dict(self.by_path)} if self.by_path else {}),
        }


def coverage_of(config: RunConfig, training: Dataset) -> Coverage:
    """The data of a run whose training data is open."""
    known = None if config.data.kind == "synthetic" else training.size
    found = _coverage(config, source_of(config), known)
    if not config.data.stages:
        return found
    taken = training.corpora_taken(config.train.samples_before(config.train.steps))
    epochs = (count / size for size, count in taken)
    return replace(found, by_path=tuple(zip(config.data.path, epochs, strict=True)))


def known_coverage(config: RunConfig) -> Coverage:
    """The data of a run as far as it is known without tokenising text. Local; reads no corpus.

    Raises:
        DataError: the data is missing or unreadable, or too short.
    """
    source = source_of(config)
    if config.data.packing == "best-fit":
        return _coverage(config, f"{source}, packed when training begins", None)
    streams = _known_streams(config)
    if streams is None:
        size = size_text(sum(file.size_bytes for file in list_documents(config.data.path)))
        return _coverage(config, f"{source}: {size}, not tokenised yet", None)
    if not streams:
        return _coverage(config, source, None)
    train, data = config.train, config.data
    parts = [
        split_part(stream, seq_len=train.seq_len, eval_fraction=data.eval_fraction, split="train")
        for stream in streams
    ]
    return _coverage(config, source, sum(part.windows(train.seq_len) for part in parts))


def source_of(config: RunConfig) -> str:
    """What a run trains on, for a person. Pure."""
    data = config.data
    if data.kind == "synthetic":
        return "synthetic, a Markov chain without end"
    paths = data.path[0] if data.path else "the Python standard library"
    more = f" and {len(data.path) - 1} more" if len(data.path) > 1 else ""
    if data.kind == "megatron":
        return f"tokens of {paths}{more}"
    return f"text of {paths}{more}, tokenizer {data.tokenizer}"


def _coverage(config: RunConfig, source: str, sequences: int | None) -> Coverage:
    train = config.train
    samples = train.samples_before(train.steps)
    return Coverage(source, sequences, train.seq_len, train.steps, train.global_batch, samples)


@dataclass(frozen=True, slots=True)
class _Counted:
    """A `TokenStream` of which only the length is known."""

    name: str
    count: int
    fingerprint: str = ""

    @property
    def documents(self) -> DocumentStarts:
        raise DataError(f"{self.name}: it is not open")

    def read(self, start: int, stop: int) -> np.ndarray:
        raise DataError(f"{self.name}: it is not open")


def _known_streams(config: RunConfig) -> list[TokenStream] | None:
    """The streams of a corpus, empty if it has none; None if text is not tokenised yet."""
    data = config.data
    if data.kind == "synthetic":
        return []
    if data.kind == "megatron":
        return [_Counted(f'data.path "{path}"', token_count(path)) for path in data.path]
    corpora = [[path] for path in data.path] if data.weights else [data.path]
    found = [
        known_text(
            corpus,
            tokenizer=data.tokenizer,
            json_key=data.json_key,
            end_of_text=data.end_of_text,
        )
        for corpus in corpora
    ]
    known = [stream for stream in found if stream is not None]
    return [*known] if len(known) == len(found) else None
