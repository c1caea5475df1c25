"""What a sample is, for a person: where it comes from, and how it begins."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from holdfast.trainer.config import DataConfig
from holdfast.trainer.data.corpora import FileTokenizer, load_tokenizer
from holdfast.trainer.data.dataset import Dataset, Sequences

_MOST_LETTERS = 60
_MOST_TOKENS = 48
_LETTERS = 256
"""The ids of the tokenizer "bytes" below this are bytes."""


def described_sample(config: DataConfig, data: Dataset, place: int) -> str:
    """A sample in a line: its number, its corpus in a mixture, and its first text or tokens.

    Args:
        place: that of the sample in the order of the run.
    """
    number = data.numbers(place, 1)[0]
    return (
        f"sample {number}{_corpus(config, data, number)}: {_beginning(config, data.sample(place))}"
    )


def _corpus(config: DataConfig, data: Dataset, number: int) -> str:
    if not config.weights:
        return ""
    ends = list(accumulate(size for size, _ in data.corpora_taken(0)))
    return f" of {config.path[bisect_right(ends, number)]}"


def _beginning(config: DataConfig, sample: Sequences) -> str:
    ids = sample.tokens[0, :_MOST_TOKENS].tolist()
    if config.kind != "text":
        return f"tokens {', '.join(map(str, ids[:8]))}, ..."
    tokenizer = load_tokenizer(config.tokenizer, end_of_text=config.end_of_text)
    if isinstance(tokenizer, FileTokenizer):
        text = tokenizer.text(ids)
    else:
        text = bytes(token for token in ids if token < _LETTERS).decode(errors="replace")
    return f"{' '.join(text.split())[:_MOST_LETTERS]!r}"
