"""Opens the samples of each kind of data."""

from __future__ import annotations

from holdfast.trainer.data.config import DataConfig
from holdfast.trainer.data.synthetic import markov_samples


def open_samples(data: DataConfig, *, vocab: int, seq_len: int, seed: int, split: str):
    return markov_samples(vocab=vocab, seq_len=seq_len, seed=seed, split=split)
