"""Text corpora as a run opens them, and their tokens."""

from __future__ import annotations

from pathlib import Path

from holdfast.trainer.config import DataConfig
from holdfast.trainer.data import Dataset, open_dataset
from holdfast.trainer.data.corpora.text import text_stream


def open_text(*paths: Path, vocab: int = 300, seq_len: int = 8, **config) -> Dataset:
    data = DataConfig(kind="text", path=[str(path) for path in paths], **config)
    return open_dataset(data, vocab=vocab, seq_len=seq_len, seed=0)


def tokens_of(*paths: Path, tokenizer: str = "bytes") -> list[int]:
    stream = text_stream([str(path) for path in paths], tokenizer=tokenizer, vocab=300)
    return stream.read(0, stream.count).tolist()
