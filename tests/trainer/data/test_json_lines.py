"""JSON Lines are read by the key of their text, and are never taken for text themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers import models

from holdfast.parallel.errors import ConfigError, DataError
from holdfast.trainer.config import DataConfig, check_data_config
from holdfast.trainer.data import prepare
from holdfast.trainer.data.corpora.json_lines import json_documents, looks_like_json_lines
from holdfast.trainer.data.corpora.text import text_stream
from holdfast.trainer.data.corpora.tokenizer import corpus_notes, load_tokenizer
from holdfast.trainer.run.resume import differing_keys


def texts(content: bytes, key: str = "text") -> list[str]:
    lines = content.splitlines(keepends=True)
    return [found.decode() for found in json_documents(lines, "x.jsonl", key)]


def test_what_programs_write_around_the_text_does_not_matter() -> None:
    written = json.dumps({"text": "é 1", "score": float("nan"), "top": float("-inf")})
    assert texts(written.encode()) == ["é 1"]
    assert texts(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n \t\n\xef\xbb\xbf{"n": 1e999, "text": "b"}\n'
    ) == [
        "a",
        "b",
    ]
    assert texts(b'{"text": ""}\n{"text": "c\\nd"}') == ["c\nd"]
    assert texts(b'{"text": "x\\ud800y", "more": {"text": "no"}}') == ["x?y"]
    assert texts(b'{"body": "q", "text": 5}', key="body") == ["q"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            b'{"body": "a", "id": 3}',
            r'line 2: has no "text"; its keys are "body", "id": .*json-key',
        ),
        (b"{}", r"its keys are none"),
        (b'{"text": ["a"]}', r'line 2: "text" is of type list'),
        (b'{"text": null}', r"of type NoneType"),
        (b'["text"]', r"line 2: is not a JSON object"),
        (b"plain", r"line 2: is not a JSON object"),
        (b'{"text": "a"', r"line 2: is not a JSON object"),
        (b'{"text": "\xff"}', r"line 2: is not a JSON object"),
        (b'{"a":' * 100000, r"line 2: is not a JSON object"),
    ],
)
def test_a_line_without_a_text_is_named_with_the_keys_it_has(line: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        texts(b'{"text": "ok"}\n' + line)
    assert "\n" not in str(caught.value)


def test_json_lines_under_another_name_are_seen() -> None:
    two = b'{"text": "a"}\n\n{"text": "b", "x": NaN}\n'
    assert looks_like_json_lines(two)
    assert looks_like_json_lines(b"\xef\xbb\xbf" + two)
    assert not looks_like_json_lines(b'{"text": "a"}\n')
    assert not looks_like_json_lines(b'{\n "text": "a"\n}\n')
    assert not looks_like_json_lines(two + b"and a line of prose\n")
    assert not looks_like_json_lines(b"prose {\n")


def test_a_corpus_takes_its_documents_from_the_lines(tmp_path: Path) -> None:
    lines = [{"text": "ab", "body": "x"}, {"text": "c", "body": "yz"}]
    folder = tmp_path / "corpus"
    folder.mkdir()
    source = folder / "d.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "e.txt").write_text("plain")

    def tokens(key: str, *paths: Path) -> list[int]:
        stream = text_stream([*map(str, paths)], tokenizer="bytes", vocab=300, json_key=key)
        return stream.read(0, stream.count).tolist()

    assert tokens("text", source) == [*b"ab", 256, *b"c", 256]
    # The cache does not take one key's tokens for another's.
    assert tokens("body", source) == [*b"x", 256, *b"yz", 256]
    assert tokens("text", folder) == [*b"ab", 256, *b"c", 256, *b"plain", 256]
    other = source.rename(folder / "d.txt")
    with pytest.raises(DataError, match=r"d\.txt.*every line of it is a JSON object.*\.jsonl"):
        tokens("text", other)


ALPACA = [{"instruction": "Add.", "output": "ab"}, {"instruction": "Go.", "output": "c"}]
TEXTS = [{"text": "ab", "n": float("nan")}, {"text": ""}, {"text": "c"}]
FROM_TEXTS = [*b"ab", 256, *b"c", 256]


def tokens_of(*paths: Path, key: str = "text") -> list[int]:
    stream = text_stream([*map(str, paths)], tokenizer="bytes", vocab=300, json_key=key)
    return stream.read(0, stream.count).tolist()


def plain(path: Path) -> list[int]:
    return [*path.read_bytes(), 256]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf \n"])
def test_a_named_file_that_is_one_array_of_objects_gives_their_texts(
    tmp_path: Path, indent: int | None, mark: bytes
) -> None:
    for name, records in {"a.json": TEXTS, "b.json": ALPACA, "c.jsonl": TEXTS}.items():
        (tmp_path / name).write_bytes(mark + json.dumps(records, indent=indent).encode())
    assert tokens_of(tmp_path / "a.json") == tokens_of(tmp_path / "c.jsonl") == FROM_TEXTS
    assert tokens_of(tmp_path / "b.json", key="output") == FROM_TEXTS
    assert tokens_of(tmp_path / "b.json", key="") == plain(tmp_path / "b.json")
    done = prepare([str(tmp_path / "b.json")], tmp_path / "out", json_key="output")
    assert (done.documents, done.tokens) == (2, 5)


def test_lines_and_one_object_in_a_json_file_give_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, TEXTS)))
    assert tokens_of(path) == FROM_TEXTS
    path.write_text(json.dumps({"text": "abc"}, indent=1))
    assert tokens_of(path) == [*b"abc", 256]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(ALPACA), 'record 1: has no "text"; its keys are "instruction", "output"'),
        (json.dumps([*TEXTS, {"txt": 1}]), 'record 4: has no "text"'),
        (json.dumps([*TEXTS, "c"]), "record 4: is not a JSON object"),
        (json.dumps([{"text": ["a"]}]), '"text" is of type list'),
        (json.dumps({"train": TEXTS}), 'its keys are "train"'),
        (json.dumps({"a\nb" * 99: 1}), 'its keys are "a\\nba'),
        ('["ab", "c"]', "record 1: is not a JSON object"),
        (json.dumps(TEXTS)[:-1], "neither a JSON array of objects nor JSON Lines"),
        ("[" * 100_000, "neither a JSON array of objects nor JSON Lines"),
        ("prose", "neither a JSON array of objects nor JSON Lines"),
    ],
)
def test_a_named_json_file_without_texts_is_refused_with_the_ways_out(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "b.json").symlink_to(path)
    for given in (path, folder):
        with pytest.raises(DataError) as caught:
            tokens_of(given)
        assert said in str(caught.value)
        assert "data.json_key" in str(caught.value) or "correct it" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert tokens_of(given, key="") == plain(path)


def test_json_among_files_of_code_is_text_unless_it_has_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    files = {
        "a.json": '{"compilerOptions": {}}',
        "b.json": "[1, 2]",
        "c.json": "// with a remark\n{}",
        "d.json": json.dumps(ALPACA),
        "e.py": "pass",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    expected = [token for name in files for token in plain(folder / name)]
    assert tokens_of(folder) == expected
    [record] = caplog.records
    assert '1 files are JSON arrays without any "text"' in record.message
    assert "d.json; data.json_key" in record.message
    (folder / "f.json").write_text(json.dumps(TEXTS))
    assert tokens_of(folder) == expected + FROM_TEXTS


def test_an_array_of_texts_under_another_suffix_is_not_taken_for_prose(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(json.dumps(TEXTS))
    with pytest.raises(DataError, match=r"a\.txt.*array of objects; give it the suffix \.json"):
        tokens_of(path)
    assert tokens_of(path, key="") == plain(path)
    path.write_text("[1, 2]")
    assert tokens_of(path) == plain(path)


def test_a_separator_of_an_unknown_name_is_named_or_missed(tmp_path: Path) -> None:
    path = tmp_path / "tok.json"
    words = {"?": 0, "a": 1, "<finis>": 2}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="?")).save(str(path))
    data = DataConfig(kind="text", tokenizer=str(path))
    [note] = corpus_notes(data, 300)
    assert "data.end_of_text" in note
    assert load_tokenizer(str(path)).separator is None
    named = DataConfig(kind="text", tokenizer=str(path), end_of_text="<finis>")
    assert corpus_notes(named, 3) == []
    assert load_tokenizer(str(path), end_of_text="<finis>").separator == 2
    with pytest.raises(DataError, match=r'data\.end_of_text = "<end>".*no such token'):
        load_tokenizer(str(path), end_of_text="<end>")
    with pytest.raises(DataError, match="has its own separator"):
        load_tokenizer("bytes", end_of_text="<finis>")
    assert corpus_notes(DataConfig(kind="text"), 257) == corpus_notes(DataConfig(), 2) == []


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("synthetic", "path", ["a.txt"]),
        ("synthetic", "tokenizer", "tok.json"),
        ("synthetic", "json_key", "body"),
        ("synthetic", "end_of_text", "<e>"),
        ("megatron", "tokenizer", "tok.json"),
        ("megatron", "json_key", "body"),
    ],
)
def test_a_key_that_the_kind_ignores_is_refused(kind: str, key: str, value: Any) -> None:
    keys: dict[str, Any] = {"kind": kind, "path": ["c"] if kind == "megatron" else []}
    check_data_config(DataConfig(**keys))
    with pytest.raises(ConfigError, match=rf'data\.{key} = .* with data\.kind = "{kind}"'):
        check_data_config(DataConfig(**(keys | {key: value})))


def test_a_run_from_before_a_key_existed_goes_on() -> None:
    saved = {"data": {"kind": "text", "path": ["a.txt"]}}
    now = {"data": msgspec.to_builtins(DataConfig(kind="text", path=["a.txt"]))}
    assert differing_keys(saved, now, ("data.",)) == []
    now["data"]["json_key"] = "body"
    assert differing_keys(saved, now, ("data.",)) == [("data.json_key", "text", "body")]
