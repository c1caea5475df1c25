"""Samples are pure functions of their index: order, layout independence, mixtures, splits."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from holdfast.parallel.errors import DataError
from holdfast.trainer.config import DataConfig
from holdfast.trainer.data import open_dataset
from holdfast.trainer.data.bigram import bigram_loss
from holdfast.trainer.data.corpora import DocumentStarts
from holdfast.trainer.data.mixture import mixture_samples, period_shares
from holdfast.trainer.data.permutation import EpochOrder
from holdfast.trainer.data.synthetic import markov_samples
from holdfast.trainer.data.windows import StreamPart, split_part, window_samples
from support.runs.sequences import windows_of

SYNTHETIC = DataConfig()


class Counting:
    """A stream whose token i is i: every window tells where it was cut."""

    def __init__(self, count: int, name: str = "counting") -> None:
        self.count = count
        self.name = name
        self.fingerprint = f"{name} {count}"

    @property
    def documents(self) -> DocumentStarts:
        return DocumentStarts(np.array([0]), "")

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.count
        return np.arange(start, stop, dtype=np.int64)


def windows(count: int, seq_len: int = 4, seed: int = 7, name: str = "counting"):
    part = StreamPart(Counting(count, name), 0, count)
    return window_samples((part,), seq_len=seq_len, vocab=count, seed=seed, name="train")


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as written in Salmon et al. 2011, table 2 and section 3.3."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


@pytest.mark.mp
def test_config_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, holdfast.trainer.config.data_section;"
        "sys.exit(bool({'torch', 'numpy', 'megatron', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("split", ["train", "eval"])
def test_samples_are_the_same_however_the_step_is_cut(split: str) -> None:
    data = open_dataset(SYNTHETIC, vocab=50, seq_len=9, seed=3, split=split)
    other = open_dataset(SYNTHETIC, vocab=50, seq_len=9, seed=3, split=split)
    for step in (0, 5):
        whole = data.batch(step, 0, global_batch=12, micro_batch_size=12)
        assert tuple(whole.tokens.shape) == tuple(whole.targets.shape) == (12, 9)
        assert whole.tokens.dtype == whole.targets.dtype == torch.int64
        assert whole.tokens[:, 1:].equal(whole.targets[:, :-1])
        assert data.predicted(step, global_batch=12) == 12 * 9
        for size in (1, 2, 3, 4, 6):
            order = reversed(range(12 // size))
            parts = {m: other.batch(step, m, global_batch=12, micro_batch_size=size) for m in order}
            for m, part in parts.items():
                rows = slice(m * size, (m + 1) * size)
                assert part.tokens.equal(whole.tokens[rows])
                assert part.targets.equal(whole.targets[rows])
        for row in range(12):
            alone = data.sample(step * 12 + row)
            assert np.array_equal(alone.tokens[0], whole.tokens[row].numpy())
            assert np.array_equal(alone.targets[0], whole.targets[row].numpy())
    assert data.fingerprint == other.fingerprint


def test_synthetic_sample_follows_the_published_generator() -> None:
    """One sample recomputed with integers only, from the chain and the numbers of the paper."""
    from holdfast.parallel.keyed_random import stream_key

    vocab, seq_len, seed, index = 11, 6, 5, 3
    samples = markov_samples(vocab=vocab, seq_len=seq_len, seed=seed, split="train")
    key, stream = stream_key(seed, "data synthetic samples", "train")
    words = []
    for block in range(2):
        counter = index * 2 + block
        words += philox(
            [counter & 0xFFFFFFFF, counter >> 32, stream & 0xFFFFFFFF, stream >> 32],
            [key & 0xFFFFFFFF, key >> 32],
        )
    tokens = [words[0] * vocab >> 32]
    for word in words[1 : seq_len + 1]:
        leading_ones = 3 if word >= 7 << 29 else 2 if word >= 3 << 30 else word >> 31
        tokens.append(int(samples.successors[leading_ones * vocab + tokens[-1]]))
    assert windows_of(samples.sequences(index, 1))[0].tolist() == tokens


def test_seed_and_split_change_the_samples() -> None:
    def first(seed: int, split: str) -> list[int]:
        data = open_dataset(SYNTHETIC, vocab=50, seq_len=40, seed=seed, split=split)
        return data.sample(0).tokens.tolist()

    assert first(1, "train") != first(2, "train")
    assert first(1, "train") != first(1, "eval")


def test_markov_chain_can_be_learnt_and_its_entropy_is_known() -> None:
    vocab = 64
    chain = markov_samples(vocab=vocab, seq_len=1000, seed=1, split="train")
    held_out = markov_samples(vocab=vocab, seq_len=1000, seed=1, split="eval")
    train = chain.sequences(0, 300).tokens.ravel()
    test = held_out.sequences(0, 20).tokens.ravel()
    frequencies = np.bincount(train, minlength=vocab) / len(train)
    single = -(frequencies * np.log(frequencies)).sum()
    assert single > 0.99 * np.log(vocab)
    assert chain.entropy <= 1.75 * np.log(2) + 1e-12
    assert bigram_loss(train, test, vocab) == pytest.approx(chain.entropy, abs=0.05)
    assert bigram_loss(train, test, vocab) < 0.35 * np.log(vocab)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_an_epoch_holds_every_item_once(size: int, seed: int, epoch: int) -> None:
    order = EpochOrder(size, seed, "train")
    assert sorted(order.item(epoch * size + i) for i in range(size)) == list(range(size))


def test_epochs_splits_and_seeds_have_orders_of_their_own() -> None:
    def epoch(number: int, seed: int = 0, name: str = "train") -> list[int]:
        order = EpochOrder(100, seed, name)
        return [order.item(number * 100 + i) for i in range(100)]

    orders = [epoch(0), epoch(1), epoch(0, seed=1), epoch(0, name="eval")]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(100)) not in orders


@pytest.mark.parametrize(("count", "size"), [(40, 9), (41, 10), (44, 10), (45, 11)])
def test_windows_cover_the_stream_once_per_epoch(count: int, size: int) -> None:
    samples = windows(count, seq_len=4)
    assert samples.size == size
    rows = windows_of(samples.sequences(size, size))
    assert sorted(rows[:, 0].tolist()) == list(range(0, 4 * size, 4))
    assert np.array_equal(rows - rows[:, :1], np.tile(np.arange(5), (size, 1)))


def test_corpora_without_weights_are_one_epoch() -> None:
    parts = tuple(StreamPart(Counting(count), 0, count) for count in (9, 21, 5))
    samples = window_samples(parts, seq_len=4, vocab=100, seed=0, name="train")
    assert samples.size == 2 + 5 + 1
    assert sorted(samples.sequences(0, 8).tokens[:, 0].tolist()) == [0, 0, 0, 4, 4, 8, 12, 16]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 400),
    seq_len=st.integers(1, 60),
    fraction=st.sampled_from([0.01, 0.05, 0.5, 0.9]),
)
def test_train_and_eval_share_no_token(count: int, seq_len: int, fraction: float) -> None:
    stream = Counting(count)

    def part(split: str) -> StreamPart:
        return split_part(stream, seq_len=seq_len, eval_fraction=fraction, split=split)

    try:
        train, held_out = part("train"), part("eval")
    except DataError:
        assert count < 2 * (seq_len + 1) or count - int(count * fraction) < seq_len + 1
        return
    assert train.start == 0
    assert train.stop == held_out.start
    assert held_out.stop == count
    assert train.windows(seq_len) >= 1
    assert held_out.windows(seq_len) >= 1


WEIGHTS = st.one_of(
    st.lists(st.integers(1, 60).map(float), min_size=1, max_size=7),
    st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.7, 1.5, 12.0]), min_size=1, max_size=6),
)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS)
def test_mixture_follows_its_weights_within_one_over_every_prefix(weights: list[float]) -> None:
    shares = period_shares(weights)
    total = sum(Fraction(repr(w)) for w in weights)
    mixture = mixture_samples(tuple(windows(21) for _ in weights), weights)
    taken = [0] * len(weights)
    for index in range(min(2 * sum(shares) + 3, 2000)):
        source, own = mixture.locate(index)
        assert own == taken[source], "each corpus hands out its own next sample"
        taken[source] += 1
        for number, weight in enumerate(weights):
            assert abs(taken[number] - Fraction(repr(weight)) / total * (index + 1)) < 1


def test_mixture_with_awkward_weights_is_rounded_and_still_within_one() -> None:
    weights = [0.123456789, 0.333333333, 0.2718281828]
    shares = np.array(period_shares(weights))
    assert shares / shares.sum() == pytest.approx(np.array(weights) / sum(weights), abs=2**-16)
    mixture = mixture_samples(tuple(windows(21) for _ in weights), weights)
    counts = np.cumsum(mixture.choices[:, None] == np.arange(3), axis=0)
    due = np.arange(1, len(counts) + 1)[:, None] * shares / shares.sum()
    assert np.abs(counts - due).max() < 1
    far = 10**12 + 17
    source, own = mixture.locate(far)
    assert abs(own - far * shares[source] / shares.sum()) < 1


def test_mixture_reads_the_samples_of_its_sources() -> None:
    sources = (windows(41, seed=1), windows(401, seed=2))
    mixture = mixture_samples(sources, [1.0, 3.0])
    assert mixture.size == 10 + 100
    rows = windows_of(mixture.sequences(5, 30))
    for row in range(30):
        source, own = mixture.locate(5 + row)
        assert np.array_equal(rows[row], windows_of(sources[source].sequences(own, 1))[0])


def test_bigram_loss_equals_the_formula_by_hand() -> None:
    # seen: 0->1 twice, 1->0 once, 1->2 once; single tokens 0: 2, 1: 2, 2: 1 of 5, one added to each
    train = np.array([0, 1, 0, 1, 2])
    p = [3 / 8, 3 / 8, 2 / 8]
    after_one_comes_two = (1 + 2 * p[2]) / (2 + 2)
    after_two_comes_zero = p[0]  # nothing was seen after 2
    after_zero_comes_zero = (0 + 1 * p[0]) / (2 + 1)
    expected = -np.log([after_one_comes_two, after_two_comes_zero, after_zero_comes_zero]).mean()
    assert bigram_loss(train, np.array([1, 2, 0, 0]), 3) == pytest.approx(expected, rel=1e-12)
    sums = [np.exp(-bigram_loss(train, np.array([1, w]), 3)) for w in range(3)]
    assert sum(sums) == pytest.approx(1)


def test_fingerprint_tells_datasets_apart() -> None:
    def fingerprint(vocab: int = 20, seq_len: int = 8, seed: int = 1, split: str = "train") -> str:
        opened = open_dataset(SYNTHETIC, vocab=vocab, seq_len=seq_len, seed=seed, split=split)
        return opened.fingerprint

    found = [fingerprint(), fingerprint(vocab=21), fingerprint(seq_len=9), fingerprint(seed=2)]
    assert len({*found, fingerprint(split="eval")}) == 5
    assert windows(42).fingerprint != windows(42, name="other").fingerprint
    mixed = [mixture_samples((windows(41), windows(81)), w).fingerprint for w in ([1, 1], [1, 2])]
    assert mixed[0] != mixed[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eval_fraction": 1.0}, "data.eval_fraction = 1.0"),
        ({"kind": "megatron"}, "name at least one prefix"),
        ({"kind": "text", "path": ["a"], "weights": [1.0, 2.0]}, "2 values and data.path has 1"),
        ({"kind": "text", "path": ["a"], "weights": [0.0]}, "data.weights[0] = 0.0"),
        ({"kind": "text", "path": ["a"], "weights": [float("nan")]}, "positive number"),
    ],
)
def test_bad_configuration_is_one_clear_line(config: dict, message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(DataConfig(**config), vocab=300, seq_len=8, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weight_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.weights\[1\] = 1e-09"):
        period_shares([1.0, 1e-9])


def test_synthetic_vocabulary_of_one_is_refused() -> None:
    with pytest.raises(DataError, match=r"model\.vocab = 1"):
        open_dataset(SYNTHETIC, vocab=1, seq_len=8, seed=0)


def test_indices_that_do_not_exist_are_refused() -> None:
    data = open_dataset(SYNTHETIC, vocab=10, seq_len=8, seed=0)
    with pytest.raises(ValueError, match="counted from 0"):
        data.sample(-1)
    with pytest.raises(ValueError, match="has 2 micro-batches"):
        data.batch(0, 2, global_batch=4, micro_batch_size=2)
    with pytest.raises(ValueError, match="split = 'test': allowed are 'train', 'eval'"):
        open_dataset(SYNTHETIC, vocab=10, seq_len=8, seed=0, split="test")
