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
from holdfast.trainer.data.json_lines import json_documents, looks_like_json_lines
from holdfast.trainer.data.text import text_stream
from holdfast.trainer.data.tokenizer import corpus_notes, load_tokenizer
from holdfast.trainer.run.resume import differing_keys


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


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


def test_a_separator_of_an_unknown_name_is_named_or_missed(tmp_path: Path) -> None:
    path = tmp_path / "tok.json"
    words = {"?": 0, "a": 1, "<finis>": 2}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="?")).save(str(path))
    data = DataConfig(kind="text", tokenizer=str(path))
    [note] = corpus_notes(data)
    assert "data.end_of_text" in note
    assert load_tokenizer(str(path)).separator is None
    named = DataConfig(kind="text", tokenizer=str(path), end_of_text="<finis>")
    assert corpus_notes(named) == []
    assert load_tokenizer(str(path), end_of_text="<finis>").separator == 2
    with pytest.raises(DataError, match=r'data\.end_of_text = "<end>".*no such token'):
        load_tokenizer(str(path), end_of_text="<end>")
    with pytest.raises(DataError, match="has its own separator"):
        load_tokenizer("bytes", end_of_text="<finis>")
    assert corpus_notes(DataConfig(kind="text")) == corpus_notes(DataConfig()) == []


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
