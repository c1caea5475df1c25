"""Weighted mixtures: the corpus of sample i, and the number of the sample within that corpus.

The method is the quota method of Balinski and Young 1975 over a fixed period. Weights are taken
as exact fractions of their decimal text: [0.7, 0.3] has a period of 10, of which 7 are the first
corpus. Along the period, a corpus may be chosen at place t while it has been chosen fewer than
its share of t times, and among those the one whose next sample would be due first is chosen. The
method is proven to keep every corpus within one sample of its share over every prefix; since a
period ends exactly on the shares, the sequence of periods does too, and a place in it is found
with one division. Weights whose period would be longer than 2^16 are rounded to multiples of 2^-16.

Shares that change at given samples (`StagedSamples`) are mixtures one after another: within each
the same holds, counted from its first sample, and every corpus goes on where it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate, pairwise
from math import gcd, lcm

import numpy as np

from holdfast.parallel.errors import DataError
from holdfast.trainer.data.dataset import Samples, Sequences

LONGEST_PERIOD = 2**16


def period_shares(weights: Sequence[float], name: str = "data.weights") -> tuple[int, ...]:
    """Whole numbers in proportion to the weights: how often each corpus is chosen in a period.

    A weight of 0 is never chosen.

    Args:
        name: the key of the weights, for an error.
    Raises:
        DataError: a weight is too small to be chosen once in the longest period.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    parts = [weight / total for weight in exact]
    period = lcm(*(part.denominator for part in parts))
    if period <= LONGEST_PERIOD:
        return tuple(int(part * period) for part in parts)
    shares = [int(part * LONGEST_PERIOD) for part in parts]
    largest_rest = sorted(
        range(len(parts)), key=lambda k: (shares[k] - parts[k] * LONGEST_PERIOD, k)
    )
    for source in largest_rest[: LONGEST_PERIOD - sum(shares)]:
        shares[source] += 1
    lost = [source for source, share in enumerate(shares) if weights[source] and not share]
    if lost:
        source = lost[0]
        raise DataError(
            f"{name}[{source}] = {weights[source]}: less than 1/{LONGEST_PERIOD} of the sum "
            "of weights is never drawn; raise it, or leave the path out"
        )
    common = gcd(*shares)
    return tuple(share // common for share in shares)


def period_choices(shares: Sequence[int]) -> np.ndarray:
    """The corpus at each place of a period: int64[sum(shares)], by the quota method."""
    share = np.array(shares, dtype=np.int64)
    period = int(share.sum())
    taken = np.zeros(len(shares), dtype=np.int64)
    choices = np.empty(period, dtype=np.int64)
    for place in range(period):
        # (taken + 1) / share is when the next sample of a corpus is due
        may = taken * period < share * (place + 1)
        due = np.divide(taken + 1, share, out=np.full(len(shares), np.inf), where=may)
        choice = int(np.argmin(due))
        choices[place] = choice
        taken[choice] += 1
    return choices


@dataclass(frozen=True, slots=True)
class MixtureSamples:
    """Samples of several corpora in fixed proportions, each corpus with epochs of its own.

    Attributes:
        sources: the corpora.
        shares: of each, how many samples a period takes from it.
        choices: int64[period]: the corpus at each place.
        ranks: int64[period]: how often that corpus was chosen before in the period.
    """

    sources: tuple[Samples, ...]
    shares: tuple[int, ...]
    choices: np.ndarray
    ranks: np.ndarray

    @property
    def size(self) -> int:
        """Number of distinct samples of all corpora together."""
        return sum(source.size for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        named = f"mixture 1 {self.shares} {[source.fingerprint for source in self.sources]}"
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def locate(self, index: int) -> tuple[int, int]:
        """The corpus that sample `index` comes from, and the index within that corpus."""
        period, place = divmod(index, len(self.choices))
        source = int(self.choices[place])
        return source, period * self.shares[source] + int(self.ranks[place])

    def taken(self, count: int) -> tuple[int, ...]:
        """How many of the first `count` samples come from each corpus."""
        periods, rest = divmod(count, len(self.choices))
        begun = np.bincount(self.choices[:rest], minlength=len(self.shares)).tolist()
        return tuple(periods * share + more for share, more in zip(self.shares, begun, strict=True))

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        return _sequences(self.sources, [self.locate(start + row) for row in range(count)])

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The numbers of samples start..start+count-1: those of each corpus follow the one's
        before it."""
        return _numbers(self.sources, [self.locate(start + row) for row in range(count)])

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples; no token is read."""
        return _predicted(self.sources, [self.locate(start + row) for row in range(count)])


@dataclass(frozen=True, slots=True)
class StagedSamples:
    """Samples of corpora whose proportions change at given samples.

    Attributes:
        stages: mixtures of the same corpora, one after another.
        firsts: of each, its first sample; 0 is the first one's.
        before: of each, how many samples the stages before take from each corpus.
    """

    stages: tuple[MixtureSamples, ...]
    firsts: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]

    @property
    def sources(self) -> tuple[Samples, ...]:
        """The corpora."""
        return self.stages[0].sources

    @property
    def size(self) -> int:
        """Number of distinct samples of all corpora together."""
        return self.stages[0].size

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal where all samples are equal."""
        shares = [stage.shares for stage in self.stages]
        named = f"staged mixture 1 {self.firsts} {shares} {[s.fingerprint for s in self.sources]}"
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def locate(self, index: int) -> tuple[int, int]:
        """The corpus that sample `index` comes from, and the index within that corpus."""
        stage = bisect_right(self.firsts, index) - 1
        source, own = self.stages[stage].locate(index - self.firsts[stage])
        return source, self.before[stage][source] + own

    def taken(self, count: int) -> tuple[int, ...]:
        """How many of the first `count` samples come from each corpus."""
        stage = max(0, bisect_right(self.firsts, count) - 1)
        own = self.stages[stage].taken(count - self.firsts[stage])
        return tuple(map(sum, zip(self.before[stage], own, strict=True)))

    def sequences(self, start: int, count: int) -> Sequences:
        """Samples start..start+count-1."""
        return _sequences(self.sources, [self.locate(start + row) for row in range(count)])

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The numbers of samples start..start+count-1: those of each corpus follow the one's
        before it."""
        return _numbers(self.sources, [self.locate(start + row) for row in range(count)])

    def predicted(self, start: int, count: int) -> int:
        """The number of tokens that are predicted in these samples; no token is read."""
        return _predicted(self.sources, [self.locate(start + row) for row in range(count)])


def _sequences(sources: Sequence[Samples], located: Sequence[tuple[int, int]]) -> Sequences:
    return Sequences.joined([sources[source].sequences(own, 1) for source, own in located])


def _numbers(sources: Sequence[Samples], located: Sequence[tuple[int, int]]) -> np.ndarray:
    firsts = list(accumulate((source.size for source in sources), initial=0))
    found = [firsts[source] + int(sources[source].numbers(own, 1)[0]) for source, own in located]
    return np.array(found, dtype=np.int64)


def _predicted(sources: Sequence[Samples], located: Sequence[tuple[int, int]]) -> int:
    taken: dict[int, list[int]] = {}
    for source, own in located:
        taken.setdefault(source, []).append(own)
    # A corpus hands out its own samples one after another.
    return sum(sources[source].predicted(own[0], len(own)) for source, own in taken.items())


def mixture_samples(
    sources: tuple[Samples, ...], weights: Sequence[float], name: str = "data.weights"
) -> MixtureSamples:
    """Mix corpora by weight; over any prefix each is within one sample of its share.

    Raises:
        DataError: a weight is too small to be chosen once in the longest period.
    """
    shares = period_shares(weights, name)
    choices = period_choices(shares)
    ranks = np.empty_like(choices)
    for source, share in enumerate(shares):
        ranks[choices == source] = np.arange(share)
    return MixtureSamples(sources, shares, choices, ranks)


def staged_samples(
    sources: tuple[Samples, ...], weights: Sequence[tuple[int, Sequence[float]]]
) -> StagedSamples:
    """Mix corpora by weights that change.

    Args:
        weights: the first sample of each stage, ascending from 0, and the weights of the corpora.
    Raises:
        DataError: a weight is too small to be chosen once in the longest period.
    """
    names = ["data.weights", *(f"data.stages[{n}].weights" for n in range(len(weights) - 1))]
    stages = tuple(
        mixture_samples(sources, own, name) for (_, own), name in zip(weights, names, strict=True)
    )
    firsts = tuple(first for first, _ in weights)
    before = [(0,) * len(sources)]
    for stage, (first, following) in zip(stages, pairwise(firsts), strict=False):
        own = stage.taken(following - first)
        before.append(tuple(map(sum, zip(before[-1], own, strict=True))))
    return StagedSamples(stages, firsts, tuple(before))


def corpora_taken(samples: Samples, count: int) -> tuple[tuple[int, int], ...]:
    """Of each corpus of a mixture, its size, and how many of the first `count` samples it gives.

    A single corpus gives all of them.
    """
    if isinstance(samples, MixtureSamples | StagedSamples):
        sizes = [source.size for source in samples.sources]
        return tuple(zip(sizes, samples.taken(count), strict=True))
    return ((samples.size, count),)
