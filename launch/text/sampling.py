"""The choice of the next token from a model's scores: the best one, or a keyed draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.parallel.errors import ConfigError, number_fault
from holdfast.parallel.keyed_random import philox_uint32, stream_key


@dataclass(frozen=True, slots=True)
class Sampling:
    """The rule by which tokens are chosen.

    Attributes:
        temperature: what scores are divided by before they become probabilities; 0: the token with
            the highest score is chosen.
        top_k: the number of tokens with the highest scores that are drawn from; 0: all.
        top_p: the share of probability that the drawn tokens have at least, from the most probable
            on; 1: all (Holtzman et al. 2020).
        seed: keys the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = (
            number_fault("--temperature", self.temperature, 0, 1e6, whole=False),
            number_fault("--top-k", self.top_k, 0),
            "" if 0 < self.top_p <= 1 else f"--top-p = {self.top_p}: allowed are over 0 to 1",
        )
        if found := next(filter(None, faults), ""):
            raise ConfigError(found)


def choose(scores: Tensor, sampling: Sampling, sample: int, position: int) -> int:
    """The next token. It is a function of the scores and of (seed, sample, position). Pure.

    Args:
        scores: float[vocab]; -inf for tokens that are never chosen.
        sample: the number of the text among those of one prompt.
        position: the place of the token in its sequence.
    """
    if sampling.temperature == 0:
        return int((scores == scores.max()).nonzero()[0])
    tokens, shares = candidates(scores, sampling)
    ends = shares.cumsum(0)
    drawn = draw(sampling.seed, sample, position) * ends[-1]
    place = int(torch.searchsorted(ends, drawn, right=True))
    return int(tokens[min(place, len(tokens) - 1)])


def candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, int64[count], and their shares, float64[count]. Pure.

    The most probable come first, and of equal ones that with the lower number. First the
    temperature is applied, then top-k, then top-p, as transformers does.
    """
    wide = scores.double().cpu() / sampling.temperature
    wide, tokens = wide.sort(descending=True, stable=True)
    count = int(torch.isfinite(wide).sum())
    if sampling.top_k:
        count = min(count, sampling.top_k)
    shares = wide[:count].softmax(0)
    before = shares.cumsum(0) - shares
    kept = max(1, int((before < sampling.top_p).sum()))
    return tokens[:kept], shares[:kept]


def draw(seed: int, sample: int, position: int) -> Tensor:
    """A number in [0, 1) with 53 bits: float64, a function of its key alone. Pure."""
    key = stream_key(seed, "generate", sample)
    high, low = philox_uint32(2, key, 2 * position, torch.device("cpu"))
    return ((high >> 5) * 2**26 + (low >> 6)).double() / 2**53
