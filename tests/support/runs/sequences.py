"""Sequences as tests compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from holdfast.trainer.data.dataset import Sequences


def windows_of(sequences: Sequences) -> np.ndarray:
    """The tokens of each sequence with its last target, int64[count, seq_len + 1].

    Every target is the token after it.
    """
    tokens, targets = sequences.tokens, sequences.targets
    assert tokens.dtype == targets.dtype == np.int64
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])
    return np.concatenate([tokens, targets[:, -1:]], axis=1)
