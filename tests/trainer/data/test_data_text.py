"""Text corpora: what is read, and every way it can be wrong."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from holdfast.parallel.errors import DataError
from holdfast.trainer.config import DataConfig
from holdfast.trainer.data import prepare
from holdfast.trainer.data.bigram import bigram_loss
from holdfast.trainer.data.corpora import document_reading
from holdfast.trainer.data.corpora.documents import library_documents
from holdfast.trainer.data.corpora.text import text_stream
from holdfast.trainer.data.opening import split_tokens
from support.runs.sequences import windows_of
from support.runs.text_corpora import open_text, tokens_of


def word_tokenizer(path: Path, words: dict[str, int], **limits) -> str:
    model = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    if limits:
        model.enable_truncation(**limits)
    model.save(str(path))
    return str(path)


def message(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_text(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_is_read_in_sorted_order_with_a_separator_after_each(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name, content in {"b.txt": "é", "a/z.txt": "zz", "a.txt": "a", ".git/x": "no"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "empty.txt").touch()
    expected = [*b"a", 256, *b"zz", 256, *"é".encode(), 256]
    assert tokens_of(folder) == expected
    assert tokens_of(folder / "b.txt", folder / "a.txt") == [*"é".encode(), 256, *b"a", 256]


def test_a_file_whose_name_is_no_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"a\xff")).write_text("ab")
    assert tokens_of(tmp_path / "in") == [97, 98, 256]


@pytest.mark.parametrize("where", ["link to a folder", "leads nowhere"])
def test_no_part_of_a_folder_is_left_out_unsaid(tmp_path: Path, where: str) -> None:
    folder, other = tmp_path / "in" / "deep", tmp_path / "other"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("text " * 20)
    if where == "link to a folder":
        other.mkdir()
    (folder / "more").symlink_to(other)
    said = message(tmp_path / "in")
    assert f"{folder / 'more'} is a link" in said
    assert where in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_part_of_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("text " * 20)
    (tmp_path / "in" / "closed").chmod(0)
    assert f"{tmp_path / 'in' / 'closed'} cannot be read" in message(tmp_path / "in")


def test_samples_are_windows_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "digits.txt"
    path.write_text("".join(chr(ord("0") + i % 75) for i in range(200)))
    data = open_text(path, seq_len=10, eval_fraction=0.0)
    assert data.size == 20
    stream = [*path.read_bytes(), 256]
    starts = [0, 10, 20]
    rows = [windows_of(data.sample(i))[0].tolist() for i in range(20)]
    for start in starts:
        assert stream[start : start + 11] in rows
    assert all(row[-1] != 256 or row == stream[190:201] for row in rows)


def test_train_and_eval_are_the_two_ends_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(os.urandom(3000).hex().encode())
    data = DataConfig(kind="text", path=[str(path)], eval_fraction=0.1)
    parts = [split_tokens(data, vocab=257, seq_len=16, split=s) for s in ("train", "eval")]
    assert len(parts[1]) == 600
    assert np.concatenate(parts).tolist() == [*path.read_bytes(), 256]


def test_a_split_of_another_name_is_refused_and_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some text " * 100)
    data = DataConfig(kind="text", path=[str(path)])
    with pytest.raises(ValueError, match="split = 'test': allowed are 'train', 'eval'"):
        split_tokens(data, vocab=257, seq_len=16, split="test")


def test_default_corpus_is_the_standard_library_without_its_tests() -> None:
    files = library_documents()
    names = [file.path.as_posix() for file in files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/site-packages/" in name or "/test/" in name for name in names)
    assert {file.path.suffix for file in files} <= {".py", ".txt", ".rst"}
    assert 2**22 < sum(file.size_bytes for file in files) <= 2**25
    data = open_text(seq_len=128)
    assert data.size > 2**15
    assert data.sample(5).tokens.shape == (1, 128)


def test_tokenizer_file_gives_the_ids_of_the_library(tmp_path: Path) -> None:
    words = {"?": 0, "big": 1, "sky": 2, "</s>": 3}
    name = word_tokenizer(tmp_path / "tokenizer.json", words, max_length=2)
    text = tmp_path / "text.txt"
    text.write_text("sky big big blue")
    # the truncation stored in the file must not shorten the corpus
    assert tokens_of(text, tokenizer=name) == [2, 1, 1, 0, 3]


def test_large_vocabularies_are_kept_in_32_bits(tmp_path: Path) -> None:
    name = word_tokenizer(tmp_path / "tokenizer.json", {"?": 0, "far": 70000})
    text = tmp_path / "text.txt"
    text.write_text("far far")
    stream = text_stream([str(text)], tokenizer=name, vocab=70001)
    assert stream.read(0, 2).tolist() == [70000, 70000]


def test_weighted_texts_are_separate_corpora(tmp_path: Path) -> None:
    for name, letter in {"a.txt": "a", "b.txt": "b"}.items():
        (tmp_path / name).write_text(letter * 500)
    data = open_text(tmp_path / "a.txt", tmp_path / "b.txt", weights=[3.0, 1.0])
    rows = np.concatenate([windows_of(data.sample(i)) for i in range(40)])
    assert (rows[:, 0] == ord("a")).sum() == 30
    assert (rows[:, 0] == ord("b")).sum() == 10


def test_bigram_model_of_real_text_beats_single_letters() -> None:
    data = DataConfig(kind="text")
    train, held_out = (
        split_tokens(data, vocab=257, seq_len=64, split=s) for s in ("train", "eval")
    )
    loss = bigram_loss(train, held_out, 257)
    assert 1.5 < loss < 3.0


def test_bad_utf8_in_a_named_file_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes("é".encode() * 10 + b"\xff tail")
    assert 'bad.txt": not UTF-8 at byte 20 (0xff)' in message(path)


def test_other_files_in_a_folder_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.png").write_bytes(b"\x89PNG\xff")
    (folder / "c.bin").write_bytes(b"zero\0byte")
    with caplog.at_level(logging.WARNING):
        assert tokens_of(folder) == [*b"good", 256]
    (record,) = caplog.records
    assert "2 files are not UTF-8 text" in record.message
    assert "b.png" in record.message


@pytest.mark.parametrize("content", ["", None])
def test_empty_text_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "corpus"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    assert "holds no tokens" in message(path)


def test_sequence_longer_than_the_corpus_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 99)
    said = message(path, seq_len=64)
    assert "100 tokens are too few for train.seq_len = 64, which needs at least 130" in said
    assert "set train.seq_len to at most 49" in said
    assert open_text(path, seq_len=49).size == 1
    assert "at most 99" in message(path, seq_len=100, eval_fraction=0.0)
    assert open_text(path, seq_len=99, eval_fraction=0.0).size == 1
    assert "lower data.eval_fraction" in message(path, seq_len=20, eval_fraction=0.9)


def test_a_vocabulary_below_the_tokenizers_is_one_line_with_its_size(tmp_path: Path) -> None:
    name = word_tokenizer(tmp_path / "tokenizer.json", {"?": 0, "a": 1, "b": 5})
    path = tmp_path / "text.txt"
    path.write_text("a a b a b " * 10)
    said = message(path, vocab=5, tokenizer=name)
    assert f'model.vocab = 5: data.tokenizer = "{name}" has the token ids 0 to 5' in said
    assert "set model.vocab to 6 or more, or leave it out" in said
    assert open_text(path, vocab=6, tokenizer=name).size > 0


def test_bytes_need_257_ids(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 100)
    assert "model.vocab = 256" in message(path, vocab=256)
    assert "to 257 or more" in message(path, vocab=256)
    assert open_text(path, vocab=257).size > 0


def test_missing_and_unusable_paths_are_one_clear_line(tmp_path: Path) -> None:
    assert "No such file or directory" in message(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in message(tmp_path / "pipe")


SPARSE_BYTES = 5 << 40


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_a_document_larger_than_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    path.write_text('[ "first' if name == "a.json" else "first")
    os.truncate(path, SPARSE_BYTES)
    monkeypatch.setattr(document_reading, "machine_memory_bytes", lambda: 1 << 30)
    said = message(path)
    assert name in said
    assert f"{SPARSE_BYTES:,}" in said or "line 1 has 134,217,729 bytes or more" in said
    assert "memory here for 134,217,728" in said or "memory here for 67,108,864" in said
    with pytest.raises(DataError, match="memory here for"):
        prepare([str(path)], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_in_a_folder_only_large_files_of_text_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.bin").touch()
    os.truncate(folder / "b.bin", SPARSE_BYTES)
    assert tokens_of(folder) == [*b"good", 256]
    monkeypatch.setattr(document_reading, "machine_memory_bytes", lambda: 24)
    (folder / "b.bin").unlink()  # other files than those in the cache
    assert "it has 4 bytes or more" in message(folder)


def test_what_begins_as_text_and_is_none_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_reading, "_HEAD_BYTES", 3)
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("aaé", encoding="utf-8")
    (folder / "b.bin").write_bytes(b"bbbb\xff")
    assert tokens_of(folder) == [*"aaé".encode(), 256]


def test_bad_tokenizers_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 100)
    assert 'data.tokenizer = "gpt9": cannot be read' in message(path, tokenizer="gpt9")
    assert "is no tokenizer" in message(path, tokenizer=str(path))
