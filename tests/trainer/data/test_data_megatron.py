"""Megatron's .bin/.idx: megatron-core reads what we write, and we read what it writes."""

from __future__ import annotations

import itertools
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.checkpoint import save
from holdfast.checkpoint.convert import Conversion, convert
from holdfast.parallel.errors import DataError, HoldfastError
from holdfast.trainer.config import DataConfig
from holdfast.trainer.data import open_dataset
from holdfast.trainer.data.corpora.megatron import megatron_stream
from holdfast.trainer.data.corpora.prepare import prepare
from holdfast.trainer.data.opening import split_tokens
from support.runs.sequences import windows_of


def indexed_dataset() -> Any:
    """Megatron's module; it imports most of torch, so not before a test needs it."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> None:
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def config(*prefixes: Path, **options) -> DataConfig:
    return DataConfig(kind="megatron", path=[str(prefix) for prefix in prefixes], **options)


def message(data: DataConfig, *, vocab: int = 1000, seq_len: int = 4) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(data, vocab=vocab, seq_len=seq_len, seed=0).sample(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_windows_cross_documents_of_a_corpus_megatron_wrote(tmp_path: Path, dtype: type) -> None:
    lengths = [3, 1, 17, 5, 8, 2, 40, 1]
    tokens = np.random.default_rng(0).integers(0, 1000, sum(lengths)).tolist()
    ends = np.cumsum([0, *lengths])
    documents = [tokens[a:b] for a, b in itertools.pairwise(ends)]
    write_with_megatron(tmp_path / "corpus", documents, dtype)
    data = open_dataset(
        config(tmp_path / "corpus", eval_fraction=0.0), vocab=1000, seq_len=4, seed=0
    )
    assert data.size == (sum(lengths) - 1) // 4
    rows = sorted(windows_of(data.sample(i))[0].tolist() for i in range(data.size))
    assert rows == sorted(tokens[4 * k : 4 * k + 5] for k in range(data.size))
    whole = split_tokens(
        config(tmp_path / "corpus.idx", eval_fraction=0.0), vocab=1000, seq_len=4, split="train"
    )
    assert whole.tolist() == tokens


def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "corpus", [list(range(100))])
    stream = megatron_stream(str(tmp_path / "corpus"))
    assert stream.read(90, 100).tolist() == list(range(90, 100))
    os.truncate(tmp_path / "corpus.bin", 4 * 95)
    assert stream.read(85, 95).tolist() == list(range(85, 95))
    with pytest.raises(DataError, match="cut off at byte 380 while it is read"):
        stream.read(90, 100)


def test_megatron_reads_what_prepare_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = ["first", "second é", "x" * 1000]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    seen: list[tuple[int, int]] = []
    done = prepare(
        [str(folder)], tmp_path / "out" / "corpus", progress=lambda a, b: seen.append((a, b))
    )
    expected = [[*text.encode(), 256] for text in texts]
    read = indexed_dataset().IndexedDataset(str(tmp_path / "out" / "corpus"))
    assert [read[i].tolist() for i in range(len(read))] == expected
    assert read.document_indices.tolist() == [0, 1, 2, 3]
    assert read.index.dtype is np.uint16
    assert (done.documents, done.tokens, done.vocab) == (3, sum(map(len, expected)), 257)
    total = sum(len(text.encode()) for text in texts)
    assert seen[-1] == (total, total)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "corpus.bin",
        "corpus.idx",
    ]


def test_index_is_the_published_format_byte_for_byte(tmp_path: Path) -> None:
    """The layout as megatron-core's _IndexWriter documents it, packed by hand."""
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("de")
    prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tmp_path / "c")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    body = struct.pack("<2i", 4, 3) + struct.pack("<2q", 0, 8) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "c.idx").read_bytes() == header + body
    assert (tmp_path / "c.bin").read_bytes() == struct.pack("<7H", *b"abc", 256, *b"de", 256)


def test_prepared_corpus_gives_the_samples_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox " * 50)
    prepare([str(tmp_path / "a.txt")], tmp_path / "c")
    text = DataConfig(kind="text", path=[str(tmp_path / "a.txt")])
    opened = [
        open_dataset(data, vocab=257, seq_len=16, seed=2) for data in (text, config(tmp_path / "c"))
    ]
    assert opened[0].size == opened[1].size
    for index in range(2 * opened[0].size):
        first, second = (windows_of(each.sample(index)) for each in opened)
        assert np.array_equal(first, second)


def test_prepare_reads_json_lines(tmp_path: Path) -> None:
    lines = [{"text": "one é", "id": 1}, {"id": 2, "text": "two"}, {"text": ""}]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    done = prepare([str(source)], tmp_path / "c", json_key="text")
    assert done.documents == 2
    stream = megatron_stream(str(tmp_path / "c"))
    assert stream.read(0, stream.count).tolist() == [*"one é".encode(), 256, *b"two", 256]
    source.write_text('{"text": "ok"}\n{"body": "no"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        prepare([str(source)], tmp_path / "d", json_key="text")
    assert not list(tmp_path.glob("d.*"))


def test_prepare_that_fails_leaves_the_old_files_alone(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("good")
    bad.write_bytes(b"\xff")
    prepare([str(good)], tmp_path / "c")
    before = (tmp_path / "c.bin").read_bytes()
    with pytest.raises(DataError, match="exists already"):
        prepare([str(good)], tmp_path / "c")
    with pytest.raises(DataError, match=r'input ".*bad\.txt": not UTF-8 at byte 0'):
        prepare([str(good), str(bad)], tmp_path / "c", overwrite=True)
    assert (tmp_path / "c.bin").read_bytes() == before
    for nameless in ("", "/", tmp_path / "..", f"{tmp_path}/"):
        with pytest.raises(DataError, match="a prefix ends in a name, such as"):
            prepare([str(good)], nameless)
    (tmp_path / "link.idx").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"link\.idx exists already"):
        prepare([str(good)], tmp_path / "link")
    assert (tmp_path / "link.idx").is_symlink()
    assert not list(tmp_path.glob("*partial*"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="no text to train on"):
        prepare([str(tmp_path / "empty.txt")], tmp_path / "d")
    assert not list(tmp_path.glob("d.*"))
    good.write_text("better")
    prepare([str(good)], tmp_path / "c", overwrite=True)
    assert megatron_stream(str(tmp_path / "c")).count == 7


def test_prefixes_with_and_without_weights(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "a", [[1] * 41])
    write_with_megatron(tmp_path / "b", [[2] * 81])
    plain = open_dataset(
        config(tmp_path / "a", tmp_path / "b", eval_fraction=0.0), vocab=3, seq_len=4, seed=0
    )
    assert [int(plain.sample(i).tokens[0, 0]) for i in range(30)].count(1) == 10
    mixed = open_dataset(
        config(tmp_path / "a", tmp_path / "b", weights=[0.9, 0.1], eval_fraction=0.0),
        vocab=3,
        seq_len=4,
        seed=0,
    )
    assert [int(mixed.sample(i).tokens[0, 0]) for i in range(30)].count(1) == 27
    held_out = open_dataset(
        config(tmp_path / "a", tmp_path / "b"), vocab=3, seq_len=4, seed=0, split="eval"
    )
    assert held_out.size == 2


def test_token_beyond_the_vocabulary_is_one_clear_line(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "c", [[0, 1, 2, 3, 777]])
    said = message(config(tmp_path / "c", eval_fraction=0.0), vocab=700)
    assert "token 4 has id 777, allowed are 0 to 699" in said
    assert "at least 778" in said
    write_with_megatron(tmp_path / "d", [[0, -1, 2, 3, 4]])
    assert "token 1 has id -1" in message(config(tmp_path / "d", eval_fraction=0.0))


def test_missing_prefix_is_one_clear_line(tmp_path: Path) -> None:
    assert "absent.idx does not exist" in message(config(tmp_path / "absent"))
    write_with_megatron(tmp_path / "c", [[1] * 50])
    (tmp_path / "c.bin").unlink()
    assert "c.bin does not exist" in message(config(tmp_path / "c"))


@pytest.mark.parametrize(
    ("suffix", "edit", "expected"),
    [
        (".idx", lambda content: b"", "not a Megatron index"),
        (".idx", lambda content: b"X" + content[1:], "not a Megatron index"),
        (".idx", lambda content: content[:9] + b"\x02" + content[10:], "has version 2"),
        (".idx", lambda content: content[:17] + b"\x06" + content[18:], "dtype code 6"),
        (".idx", lambda content: content[:-1], "cut off"),
        (".idx", lambda content: content[:42] + b"\x08" + content[43:], "one after another"),
        (".bin", lambda content: content[:-1], "cut off"),
        (".bin", lambda content: content + b"more", "do not belong together"),
        (".bin", lambda content: b"", "is empty"),
    ],
)
def test_damaged_pairs_are_one_clear_line(tmp_path: Path, suffix: str, edit, expected: str) -> None:
    write_with_megatron(tmp_path / "c", [[1] * 50, [2] * 50])
    path = tmp_path / f"c{suffix}"
    path.write_bytes(edit(path.read_bytes()))
    assert expected in message(config(tmp_path / "c"))


def test_missing_megatron_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_with_megatron(tmp_path / "c", [[1] * 50])
    monkeypatch.setitem(sys.modules, "megatron.core.datasets", None)
    monkeypatch.delitem(sys.modules, "megatron.core.datasets.indexed_dataset")
    assert "pip install 'holdfast[megatron]'" in message(config(tmp_path / "c"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"holdfast\[megatron\]"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "d")


@pytest.mark.parametrize("place", ["/proc/out", "/proc/missing/out", "/dev/null/out"])
def test_a_place_that_cannot_be_written_is_named_in_a_line(tmp_path: Path, place: str) -> None:
    """Root may write wherever there is a disk, so these are places without one."""
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(DataError, match=rf"^{place}: cannot be written \(.*name a folder"):
        prepare([str(tmp_path / "text.txt")], place)
    save(tmp_path / "checkpoint", {"model": torch.nn.Linear(2, 2)})
    with pytest.raises(HoldfastError, match=f"^{place} (cannot be (written|read)|is no folder)"):
        convert(Conversion(tmp_path / "checkpoint", Path(place), "dcp"))
