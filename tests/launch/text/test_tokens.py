"""Text comes in whole characters, and is that of all tokens at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from holdfast.launch.text.tokens import TextStream, TextTokenizer, named_tokenizer, open_tokenizer
from holdfast.parallel.errors import ConfigError

TEXT = "caf\u00e9 \u2014 \u4f60\u597d \U0001f525\u200d\U0001f525, a  b\tc\n big big sky\n"


def trained(kind: str) -> Tokenizer:
    """A small tokenizer as published models have them."""
    if kind == "bytes":
        files, _ = named_tokenizer("bytes")
        return Tokenizer.from_buffer(files["tokenizer.json"])
    if kind == "byte-level":
        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        found = Tokenizer(models.BPE(byte_fallback=True))
        found.pre_tokenizer = pre_tokenizers.Metaspace()
        found.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
        )
        alphabet = []
    given: Any = {"vocab_size": 300, "initial_alphabet": alphabet, "show_progress": False}
    given["special_tokens"] = ["</s>", *(f"<0x{n:02X}>" for n in range(256))][:257]
    if kind == "byte-level":
        given["special_tokens"] = ["</s>"]
    found.train_from_iterator([TEXT, "the big sky of the big sky"], trainers.BpeTrainer(**given))
    return found


KINDS = ("bytes", "byte-level", "metaspace")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_streamed_text_is_the_text_of_all_tokens(kind: str, cut: int) -> None:
    tokenizer = TextTokenizer(trained(kind), adds_special_tokens=False)
    ids = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer, ids[:cut])
    parts = [stream.add(token) for token in ids[cut:]] + [stream.rest()]
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    if not before.endswith("\ufffd"):
        assert before + "".join(parts) == whole
    assert "".join(parts) == stream.text
    assert not any("\ufffd" in part for part in parts[:-1])
    assert sum(map(bool, parts)) > 4, "text comes as it is made"


def test_a_character_that_is_never_whole_ends_the_text() -> None:
    tokenizer = TextTokenizer(trained("bytes"), adds_special_tokens=False)
    stream = TextStream(tokenizer, [72])
    fire = "\U0001f525".encode()
    assert [stream.add(token) for token in (105, *fire[:3])] == ["i", "", "", ""]
    assert stream.rest() == "\ufffd"
    assert stream.text == "i\ufffd"


@pytest.mark.parametrize("kind", ["bytes", "byte-level"])
def test_the_bytes_of_tokens_are_those_of_their_text(kind: str) -> None:
    tokenizer = TextTokenizer(trained(kind), adds_special_tokens=False)
    counts = tokenizer.byte_counts()
    assert counts is not None
    ids = tokenizer.encode(TEXT)
    assert sum(counts[token] for token in ids) == len(TEXT.encode())
    special = 256 if kind == "bytes" else 0
    assert counts[special] == 0
    assert TextTokenizer(trained("metaspace"), False).byte_counts() is None


def test_special_tokens_are_text_where_the_folder_says_so() -> None:
    files, separator = named_tokenizer("bytes")
    text = "a<|endoftext|>"
    assert separator == 256
    asked = {"adds_special_tokens": False}
    assert open_tokenizer(files, "it", **asked).encode(text) == list(text.encode())
    settings = {"tokenizer_config.json": json.dumps({"split_special_tokens": False}).encode()}
    assert open_tokenizer({**files, **settings}, "it", **asked).encode(text) == [97, 256]


def test_a_missing_or_damaged_tokenizer_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"it has no tokenizer\.json.*give --tokenizer"):
        open_tokenizer({}, "it", adds_special_tokens=False)
    with pytest.raises(ConfigError, match="it: its tokenizer cannot be read"):
        open_tokenizer({"tokenizer.json": b"{}"}, "it", adds_special_tokens=False)
