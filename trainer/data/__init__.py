"""Training data: what sample i holds is a pure function of the configuration, the seed and i.

`holdfast.trainer.data.config` and this module import neither torch nor numpy, so that the command
line can check a configuration in milliseconds.
"""

from __future__ import annotations

from holdfast.trainer.data.config import DataConfig
from holdfast.trainer.data.dataset import Dataset

__all__ = ["DataConfig", "Dataset", "open_dataset"]


def open_dataset(
    data: DataConfig, *, vocab: int, seq_len: int, seed: int, split: str = "train"
) -> Dataset:
    """The samples of one split, equal on every rank. Local: no rank talks to another.

    Args:
        data: the `[data]` section. Its `seed` is not looked at: the caller resolves it.
        vocab: number of token ids of the model; every token is below it.
        seq_len: tokens per training sequence; a sample has one more, the last target.
        seed: keys the order of the samples (and, for synthetic data, their content).
        split: "train" or "eval"; the two share no token.

    Raises:
        DataError: data that is missing, unreadable, empty, too short, or beyond the vocabulary.
    """
    # numpy, torch and the readers are needed from here on only
    from holdfast.trainer.data.opening import open_samples
    from holdfast.trainer.data.sampling import SampledDataset

    return SampledDataset(open_samples(data, vocab=vocab, seq_len=seq_len, seed=seed, split=split))
