"""Opens the samples in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_never

import numpy as np

from holdfast.trainer.config import DataConfig, check_data_config
from holdfast.trainer.data.corpora import TokenStream, megatron_stream, text_stream
from holdfast.trainer.data.dataset import Dataset, Samples
from holdfast.trainer.data.fill_in_middle import FillInMiddleSamples, fill_in_middle
from holdfast.trainer.data.mixture import mixture_samples, staged_samples
from holdfast.trainer.data.packing import packed_samples
from holdfast.trainer.data.removal import without
from holdfast.trainer.data.sampling import SampledDataset
from holdfast.trainer.data.synthetic import markov_samples
from holdfast.trainer.data.windows import (
    StreamPart,
    check_split,
    split_part,
    window_samples,
)

StepSamples = Callable[[int], int]
"""The number of samples of all steps before one, counted from 0."""


def open_samples(
    data: DataConfig,
    *,
    vocab: int,
    seq_len: int,
    seed: int,
    split: str,
    before: StepSamples | None = None,
) -> Samples:
    """The samples of one split; see `holdfast.trainer.data.open_dataset`.

    Raises:
        DataError: the data cannot be used.
        ValueError: the split is unknown, `seq_len` is below 1, or stages lack `before`.
    """
    check_data_config(data)
    check_split(split)
    if seq_len < 1:
        raise ValueError(f"seq_len = {seq_len}: a sequence has at least one token")
    by_document = data.packing != "concatenated"
    if data.kind == "synthetic":
        return markov_samples(
            vocab=vocab, seq_len=seq_len, seed=seed, split=split, by_document=by_document
        )

    def cut(parts: tuple[StreamPart, ...], name: str) -> Samples:
        settings: dict[str, Any] = dict(seq_len=seq_len, vocab=vocab, seed=seed, name=name)
        if data.fim_rate and split == "train":
            windows = window_samples(parts, by_document=True, **settings)
            return FillInMiddleSamples(windows, fill_in_middle(data))
        if data.packing == "best-fit":
            return packed_samples(parts, buffer=data.packing_buffer, **settings)
        return window_samples(parts, by_document=by_document, **settings)

    parts = _parts(data, vocab=vocab, seq_len=seq_len, split=split)
    if not data.weights:
        return cut(parts, split)
    sources = tuple(cut((part,), f"{split} {number}") for number, part in enumerate(parts))
    if not data.stages or split != "train":
        return mixture_samples(sources, data.weights)
    if before is None:
        raise ValueError("data.stages begin at steps: say how many samples there are before one")
    firsts = [(before(stage.start), stage.weights) for stage in data.stages]
    return staged_samples(sources, [(0, data.weights), *firsts])


def split_tokens(data: DataConfig, *, vocab: int, seq_len: int, split: str) -> np.ndarray:
    """All tokens of one split of a corpus in their order: int64[tokens], in memory.

    It serves statistics of corpora that fit in memory, such as `bigram_loss`.

    Raises:
        DataError: the data cannot be used.
        ValueError: the data is synthetic and has no stream.
    """
    check_data_config(data)
    parts = _parts(data, vocab=vocab, seq_len=seq_len, split=split)
    return np.concatenate([part.stream.read(part.start, part.stop) for part in parts])


def _parts(data: DataConfig, *, vocab: int, seq_len: int, split: str) -> tuple[StreamPart, ...]:
    """One part per corpus."""
    return tuple(
        split_part(stream, seq_len=seq_len, eval_fraction=data.eval_fraction, split=split)
        for stream in _streams(data, vocab)
    )


def _streams(data: DataConfig, vocab: int) -> list[TokenStream]:
    """One stream per corpus: text without weights is one corpus, else every path is one."""
    match data.kind:
        case "megatron":
            return [megatron_stream(prefix) for prefix in data.path]
        case "text":
            corpora = [[path] for path in data.path] if data.weights else [data.path]
            return [
                text_stream(
                    corpus,
                    tokenizer=data.tokenizer,
                    vocab=vocab,
                    json_key=data.json_key,
                    end_of_text=data.end_of_text,
                )
                for corpus in corpora
            ]
        case "synthetic":
            raise ValueError("synthetic data is not a stream: take samples from open_dataset")
        case unknown:
            assert_never(unknown)


def open_dataset(
    data: DataConfig,
    *,
    vocab: int,
    seq_len: int,
    seed: int,
    split: str = "train",
    before: StepSamples | None = None,
) -> Dataset:
    """The samples of one split, equal on every rank. Local; no communication.

    Args:
        data: the `[data]` section. Its `seed` is ignored: the caller resolves it.
        vocab: the number of token ids of the model; every token is below it.
        seq_len: tokens per training sequence; a sample has one more, the last target.
        seed: the key of the order of samples (and, for synthetic data, of their content).
        split: "train" or "eval"; the two share no token.
        before: the number of samples before a step; needed with `data.stages` and `data.without`,
            which begin there.

    Raises:
        DataError: the data is missing, unreadable, empty, too short, or beyond the vocabulary.
    """
    samples = open_samples(
        data, vocab=vocab, seq_len=seq_len, seed=seed, split=split, before=before
    )
    if not data.without or split != "train":
        return SampledDataset(samples)
    if before is None:
        raise ValueError("data.without begins at steps: say how many samples there are before one")
    removed = [(before(removal.start), removal.samples) for removal in data.without]
    return SampledDataset(without(samples, removed))
