"""Documents in training sequences: where they end, what is predicted, how they are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from holdfast import _native
from holdfast.parallel.errors import DataError
from holdfast.parallel.pipeline import Documents
from holdfast.trainer.config import DataConfig
from holdfast.trainer.data import open_dataset, open_samples, prepare
from holdfast.trainer.data.corpora import DocumentStarts
from holdfast.trainer.data.dataset import NOTHING, Samples, Sequences
from holdfast.trainer.data.mixture import mixture_samples
from holdfast.trainer.data.packing import pack, packed_samples
from holdfast.trainer.data.synthetic import markov_samples
from holdfast.trainer.data.windows import StreamPart, window_samples

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


class Corpus:
    """Token i is i; documents have the given lengths."""

    def __init__(self, lengths: list[int], unit: int = 1) -> None:
        self.lengths, self.count = lengths, sum(lengths)
        self.name = self.fingerprint = f"{lengths}"
        starts = np.cumsum([0, *lengths[:-1]])
        self.documents = DocumentStarts(starts * unit, "", unit)
        self.starts = set(starts.tolist())

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.count
        return np.arange(start, stop, dtype=np.int64)


def part_of(corpus: Corpus, start: int = 0, stop: int | None = None) -> StreamPart:
    return StreamPart(corpus, start, corpus.count if stop is None else stop)


def predicted_pairs(sequences: Sequences) -> list[tuple[int, int]]:
    """(token, target) of every place where something is predicted."""
    kept = sequences.targets != NOTHING
    return list(zip(sequences.tokens[kept].tolist(), sequences.targets[kept].tolist(), strict=True))


def assert_consistent(samples: Samples, start: int, count: int, seq_len: int) -> Sequences:
    """Lengths fill each sequence, and the counts without reading are those of what is read."""
    sequences = samples.sequences(start, count)
    assert sequences.tokens.shape == sequences.targets.shape == (count, seq_len)
    assert sequences.lengths is not None
    assert [sum(row) for row in sequences.lengths] == [seq_len] * count
    assert all(min(row) >= 1 for row in sequences.lengths)
    assert samples.predicted(start, count) == (sequences.targets != NOTHING).sum()
    for row, own in enumerate(sequences.lengths):
        alone = samples.sequences(start + row, 1)
        assert np.array_equal(alone.tokens[0], sequences.tokens[row])
        assert np.array_equal(alone.targets[0], sequences.targets[row])
        assert alone.lengths == (own,)
    return sequences


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), unit=st.sampled_from([1, 2, 4]))
def test_windows_predict_each_token_but_the_first_of_a_document(
    lengths: list[int], seq_len: int, unit: int
) -> None:
    corpus = Corpus(lengths, unit)
    if corpus.count <= seq_len:
        return
    samples = window_samples(
        (part_of(corpus),), seq_len=seq_len, vocab=2**20, seed=3, name="train", by_document=True
    )
    sequences = assert_consistent(samples, 0, samples.size, seq_len)
    covered = range(1, samples.size * seq_len + 1)
    expected = [(t - 1, t) for t in covered if t not in corpus.starts]
    assert sorted(predicted_pairs(sequences)) == expected
    assert sequences.lengths is not None
    for tokens, own in zip(sequences.tokens.tolist(), sequences.lengths, strict=True):
        begun = {tokens[end] for end in np.cumsum(own)[:-1].tolist()}
        assert begun == corpus.starts & set(tokens[1:])


def test_windows_by_document_have_the_tokens_and_the_order_of_plain_ones() -> None:
    parts = tuple(part_of(Corpus(lengths)) for lengths in ([5, 9, 1, 20], [30, 2]))
    settings_: dict[str, Any] = dict(seq_len=6, vocab=99, seed=5, name="train")
    plain = window_samples(parts, **settings_)
    cut = window_samples(parts, by_document=True, **settings_)
    assert plain.size == cut.size
    ours, theirs = cut.sequences(3, 40), plain.sequences(3, 40)
    assert np.array_equal(ours.tokens, theirs.tokens)
    kept = ours.targets != NOTHING
    assert np.array_equal(ours.targets[kept], theirs.targets[kept])
    assert theirs.lengths is None
    assert plain.predicted(3, 40) == 240
    assert plain.fingerprint != cut.fingerprint


def packed_plainly(sizes: list[int], room: int, buffer: int) -> list[int]:
    """Best fit as its definition says, by looking through all open sequences."""
    chosen: list[int] = []
    left: list[tuple[int, int, int]] = []  # room, when it came to have it, bin
    bins = 0
    for time, size in enumerate(sizes):
        fitting = [entry for entry in left if entry[0] >= size]
        if fitting:
            entry = min(fitting)
            left.remove(entry)
            rest, which = entry[0], entry[2]
        else:
            if len(left) == buffer:
                left.remove(min(left))
            rest, which, bins = room, bins, bins + 1
        if rest > size:
            left.append((rest - size, time, which))
        chosen.append(which)
    return chosen


@settings(max_examples=150, deadline=None)
@given(
    room=st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 65, 130, 5000])),
    buffer=st.integers(1, 7),
    data=st.data(),
)
def test_native_best_fit_is_that_of_the_definition(
    room: int, buffer: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, room), max_size=80))
    given_sizes, bins = np.array(sizes, dtype=np.int64), np.empty(len(sizes), dtype=np.int64)
    count = _native.best_fit(bins.ctypes.data, given_sizes.ctypes.data, len(sizes), room, buffer)
    assert bins.tolist() == packed_plainly(sizes, room, buffer)
    assert count == len(set(bins.tolist()))


@pytest.mark.parametrize(
    ("sizes", "room", "buffer"), [([0], 4, 1), ([5], 4, 1), ([1], 0, 1), ([1], 4, 0)]
)
def test_native_best_fit_refuses_what_fits_nowhere(
    sizes: list[int], room: int, buffer: int
) -> None:
    items, bins = np.array(sizes), np.empty(1, dtype=np.int64)
    with pytest.raises(ValueError, match=r"size|room"):
        _native.best_fit(bins.ctypes.data, items.ctypes.data, 1, room, buffer)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), buffer=st.integers(1, 5))
def test_packing_predicts_each_token_but_the_first_of_a_document_once(
    lengths: list[int], seq_len: int, buffer: int
) -> None:
    corpus = Corpus(lengths)
    settings_: dict[str, Any] = dict(seq_len=seq_len, vocab=2**20, seed=3, name="train")
    if max(lengths) == 1:
        with pytest.raises(DataError, match="no document has two tokens"):
            packed_samples((part_of(corpus),), buffer=buffer, **settings_)
        return
    samples = packed_samples((part_of(corpus),), buffer=buffer, **settings_)
    sequences = assert_consistent(samples, 0, samples.size, seq_len)
    expected = [(t - 1, t) for t in range(corpus.count) if t not in corpus.starts]
    assert sorted(predicted_pairs(sequences)) == expected
    assert sequences.lengths is not None
    for targets, own in zip(sequences.targets, sequences.lengths, strict=True):
        ends = np.cumsum(own)
        for first, last in zip(ends - own, ends, strict=True):
            piece = targets[first:last]
            assert (piece == NOTHING).all() or (np.diff(piece) == 1).all(), "one piece of a text"
    # Documents are cut only where they exceed a sequence.
    pieces = sum((t != NOTHING) for own in sequences.lengths for t in own) - sum(
        bool(targets[-1] == NOTHING) for targets in sequences.targets
    )
    assert pieces == sum(-(-(length - 1) // seq_len) for length in lengths)


def test_packing_of_parts_of_streams_reads_no_other_part() -> None:
    first, second = Corpus([10, 10, 10]), Corpus([7, 30, 3])
    parts = (part_of(first, 0, 25), part_of(second, 12, 40))
    samples = packed_samples(parts, seq_len=8, vocab=99, seed=1, name="train", buffer=9)
    pairs = sorted(predicted_pairs(samples.sequences(0, samples.size)))
    expected = [(t - 1, t) for t in range(1, 25) if t not in first.starts]
    expected += [(t - 1, t) for t in range(13, 40) if t not in second.starts]
    assert pairs == sorted(expected)


def test_packing_leaves_little_padding_and_cuts_little() -> None:
    """Documents of a usual distribution: windows cut two thirds of them, best fit nearly none."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 1.2, 20_000), 2, 50_000).astype(np.int64)
    stops = np.cumsum(lengths)
    packing = pack(stops - lengths, stops, seq_len=2048, buffer=1024)
    assert packing.filled.sum() == (lengths - 1).sum()
    assert packing.filled.sum() / (packing.count * 2048) > 0.99
    assert len(packing.lengths) == (-(-(lengths - 1) // 2048)).sum()


def test_a_mixture_counts_what_its_corpora_predict() -> None:
    sources = tuple(
        window_samples(
            (part_of(Corpus(lengths)),),
            seq_len=5,
            vocab=99,
            seed=seed,
            name="train",
            by_document=True,
        )
        for seed, lengths in enumerate(([3, 3, 20], [40], [1] * 30))
    )
    assert_consistent(mixture_samples(sources, [1.0, 2.0, 0.5]), 4, 37, 5)


def test_synthetic_documents_are_uneven_and_change_no_token() -> None:
    settings_: dict[str, Any] = dict(vocab=50, seq_len=128, seed=3, split="train")
    plain, cut = markov_samples(**settings_), markov_samples(**settings_, by_document=True)
    sequences = assert_consistent(cut, 5, 60, 128)
    assert np.array_equal(sequences.tokens, plain.sequences(5, 60).tokens)
    assert sequences.lengths is not None
    lengths = [length for row in sequences.lengths for length in row]
    assert min(lengths) <= 2
    assert max(lengths) >= 100
    assert cut.fingerprint != plain.fingerprint


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda count: st.lists(st.permutations([1, 2, 3, 4, 6]), min_size=count, max_size=count)
    )
)
def test_documents_know_their_ends_and_positions(rows: list[list[int]]) -> None:
    documents = Documents.of((length for row in rows for length in row), len(rows))
    ends = np.cumsum([length for row in rows for length in row]).tolist()
    assert documents.cu_seqlens == (0, *ends)
    expected = [[place for length in row for place in range(length)] for row in rows]
    assert documents.positions.t().tolist() == expected
    assert documents.lengths == [length for row in rows for length in row]


def text_files(folder: Path) -> list[str]:
    """Three files: of 5 tokens with its end, of 70, of 1 (empty: its end alone)."""
    for name, text in (("a", "four"), ("b", "x" * 69), ("c", "")):
        (folder / f"{name}.txt").write_text(text)
    return [str(folder / f"{name}.txt") for name in "abc"]


@pytest.mark.parametrize("packing", ["documents", "best-fit"])
def test_text_and_prepared_tokens_have_the_same_documents(tmp_path: Path, packing: Any) -> None:
    paths = text_files(tmp_path)
    prepare(paths, tmp_path / "corpus")
    text = DataConfig(kind="text", path=paths, packing=packing, eval_fraction=0.0)
    tokens = DataConfig(
        kind="megatron", path=[str(tmp_path / "corpus")], packing=packing, eval_fraction=0.0
    )
    opened = [
        open_samples(data, vocab=257, seq_len=16, seed=1, split="train") for data in (text, tokens)
    ]
    assert opened[0].size == opened[1].size
    first, second = (assert_consistent(samples, 0, samples.size, 16) for samples in opened)
    assert first.lengths == second.lengths
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.targets, second.targets)
    predicted = (first.targets != NOTHING).sum()
    # 76 tokens in windows of 16 are 4 windows, that is 64 targets, one of which begins a document.
    assert predicted == (63 if packing == "documents" else 4 + 69)


def test_documents_of_several_sequences_are_one_document(tmp_path: Path) -> None:
    """Megatron's index may cut a document into sequences: sentences, for some models."""
    from holdfast.trainer.data.corpora.megatron import indexed_dataset_module, megatron_stream

    prefix = str(tmp_path / "sentences")
    builder = indexed_dataset_module().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for lengths in ([3, 4], [5], [2, 2, 2]):
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(f"{prefix}.idx")
    stream = megatron_stream(prefix)
    assert stream.documents.within(0, stream.count).tolist() == [0, 7, 12]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"packing": "best-fit"}, 'set data.packing = "documents"'),
        ({"packing": "documents", "packing_buffer": 7}, "it would not be used"),
        ({"kind": "text", "packing": "best-fit", "packing_buffer": 0}, "use 1 or more"),
    ],
)
def test_settings_of_packing_that_cannot_be_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_dataset(DataConfig(**keys), vocab=257, seq_len=16, seed=1)


def test_json_lines_are_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "ab" * number}) for number in range(1, 40)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    data = DataConfig(
        kind="text", path=[str(tmp_path / "lines.jsonl")], packing="best-fit", eval_fraction=0.0
    )
    samples = open_samples(data, vocab=257, seq_len=100, seed=1, split="train")
    sequences = assert_consistent(samples, 0, samples.size, 100)
    assert (sequences.targets != NOTHING).sum() == sum(2 * number for number in range(1, 40))
