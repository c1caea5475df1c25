"""A bigram model by counting: the baseline that a trained model has to beat."""

from __future__ import annotations

import numpy as np


def bigram_loss(train_tokens: np.ndarray, eval_tokens: np.ndarray, vocab: int) -> float:
    """Held-out cross-entropy of a counted bigram model, in nats per token.

    The model is interpolated as in Witten and Bell 1991: with c(v) tokens seen after v, of which
    T(v) distinct, p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)); p(w) is counted with one added
    to every token of the vocabulary. For text this is stronger than adding one to every pair.

    Args:
        train_tokens: int64[n], counted.
        eval_tokens: int64[m], m ≥ 2; tokens 1.. are predicted, each from the one before.
        vocab: number of token ids.

    Raises:
        ValueError: fewer than two tokens to evaluate on.
    """
    if len(eval_tokens) < 2:
        raise ValueError(f"{len(eval_tokens)} tokens to evaluate on: at least 2 are needed")
    single = (np.bincount(train_tokens, minlength=vocab) + 1) / (len(train_tokens) + vocab)
    pairs, counts = np.unique(train_tokens[:-1] * vocab + train_tokens[1:], return_counts=True)
    followed = np.bincount(train_tokens[:-1], minlength=vocab)
    distinct = np.bincount(pairs // vocab, minlength=vocab)

    before, after = eval_tokens[:-1], eval_tokens[1:]
    wanted = before * vocab + after
    place = np.minimum(np.searchsorted(pairs, wanted), max(len(pairs) - 1, 0))
    seen = np.zeros(len(wanted))
    if len(pairs):
        seen = np.where(pairs[place] == wanted, counts[place], 0)
    known = followed[before] > 0
    total = np.where(known, followed[before] + distinct[before], 1)
    mixed = (seen + distinct[before] * single[after]) / total
    return float(-np.log(np.where(known, mixed, single[after])).mean())
