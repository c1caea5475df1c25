"""Tokenizers: plain bytes, or any `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from holdfast.checkpoint.format import expanded
from holdfast.parallel.errors import DataError
from holdfast.parallel.reading import read_regular
from holdfast.trainer.config import too_few_ids

if TYPE_CHECKING:
    import tokenizers

    from holdfast.trainer.config import DataConfig

BYTE_SEPARATOR = 256
_BYTE_SEPARATOR_NAME = "<|endoftext|>"
# the names under which published tokenizers keep their end-of-document token, most common first
SEPARATOR_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "[EOS]")


class Tokenizer(Protocol):
    """Turns documents into token ids."""

    @property
    def vocab(self) -> int:
        """One more than the largest id that it gives, the separator included."""
        ...

    @property
    def separator(self) -> int | None:
        """The id that ends every document; None if the tokenizer has none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal where all encodings are equal."""
        ...

    @property
    def memory_ratio(self) -> int:
        """Bytes of memory for each byte of a document that is read, encoded and written."""
        ...

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document (valid UTF-8), one-dimensional, without the separator."""
        ...


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """Token ids are the bytes of the UTF-8 text; id 256 ends a document."""

    vocab: int = 257
    separator: int | None = BYTE_SEPARATOR
    fingerprint: str = "bytes"
    memory_ratio: int = 8

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document: uint8[bytes]."""
        return [np.frombuffer(document, dtype=np.uint8) for document in documents]


@dataclass(frozen=True, slots=True)
class FileTokenizer:
    """A `tokenizer.json`, without the special tokens that its template would add."""

    vocab: int
    separator: int | None
    fingerprint: str
    model: tokenizers.Tokenizer
    memory_ratio: int = 128

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document: int64[tokens]; several documents at once use several cores."""
        texts = [document.decode("utf-8") for document in documents]
        encodings = self.model.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return self.model.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(name: str, *, key: str = "data.tokenizer", end_of_text: str = "") -> Tokenizer:
    """The tokenizer "bytes", or that of a `tokenizer.json` file.

    Args:
        key: the tokenizer's name in messages.
        end_of_text: the name of the separator; "": the first of `SEPARATOR_NAMES` that exists.

    Raises:
        DataError: the file is missing or is not a tokenizer, or has no such separator.
    """
    if name == "bytes":
        if end_of_text:
            raise DataError(
                f'data.end_of_text = "{end_of_text}": {key} = "bytes" has its own separator, id '
                f"{BYTE_SEPARATOR}; leave it out"
            )
        return ByteTokenizer()
    path = expanded(name, key)
    allowed = 'allowed are "bytes" and the path of a tokenizer.json'
    try:
        content = read_regular(path)
    except OSError as error:
        raise DataError(
            f'{key} = "{name}": cannot be read ({error.strerror}); {allowed}'
        ) from error
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f'{key} = "{name}": is no tokenizer ({error}); {allowed}') from error
    # a file may carry the limits of a fine-tuning run, which would silently shorten documents
    model.no_truncation()
    model.no_padding()
    names = (end_of_text,) if end_of_text else SEPARATOR_NAMES
    ids = (model.token_to_id(separator) for separator in names)
    separator = next((found for found in ids if found is not None), None)
    if end_of_text and separator is None:
        raise DataError(
            f'data.end_of_text = "{end_of_text}": {key} = "{name}" has no such token; name one of '
            "its tokens as the file writes it"
        )
    vocab = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return FileTokenizer(vocab, separator, blake2b(content, digest_size=16).hexdigest(), model)


def separator_note(tokenizer: Tokenizer, name: str) -> str:
    """A line for a person where nothing will stand between documents; else ""."""
    if tokenizer.separator is not None:
        return ""
    return (
        f"{name} has none of the tokens {', '.join(SEPARATOR_NAMES)}: documents are joined with "
        "nothing between them; name its end-of-text token with data.end_of_text (--end-of-text)"
    )


def require_vocab(tokenizer: Tokenizer, name: str, vocab: int) -> None:
    """Raise DataError if the tokenizer of this name has ids beyond a model's vocabulary."""
    if vocab < tokenizer.vocab:
        raise DataError(too_few_ids(vocab, name, tokenizer.vocab))


def corpus_notes(data: DataConfig, vocab: int) -> list[str]:
    """Lines for a person on how a corpus is read. It reads the tokenizer's file, no text.

    Args:
        vocab: the vocabulary of the model.
    Raises:
        DataError: the tokenizer is bad, or has more ids than the vocabulary.
    """
    if data.kind != "text":
        return []
    encoder = load_tokenizer(data.tokenizer, end_of_text=data.end_of_text)
    require_vocab(encoder, data.tokenizer, vocab)
    note = separator_note(encoder, f'data.tokenizer = "{data.tokenizer}"')
    return [f"warning: {note}"] if note else []


@dataclass(frozen=True, slots=True)
class ExportedTokenizer:
    """The files of a tokenizer beside a model, and the token between documents."""

    separator: int | None = None
    """The id that ends every document; None if there is none, or it is not known."""
    files: Mapping[str, bytes] = field(default_factory=dict)


def exported_tokenizer(data: DataConfig, longest: int) -> ExportedTokenizer:
    """The tokenizer of a run; without files where its data is not text.

    Args:
        longest: the longest sequence of the model, in tokens.
    Raises:
        DataError: the tokenizer's file cannot be read, or is none.
    """
    if data.kind != "text":
        return ExportedTokenizer()
    tokenizer = load_tokenizer(data.tokenizer, end_of_text=data.end_of_text)
    name = _BYTE_SEPARATOR_NAME
    if isinstance(tokenizer, FileTokenizer):
        content = read_regular(expanded(data.tokenizer, "data.tokenizer"))
        found = tokenizer.separator
        name = "" if found is None else tokenizer.model.id_to_token(found) or ""
    else:
        content = _json(_bytes_as_file())
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    if name:
        described |= {"bos_token": name, "eos_token": name}
    if data.tokenizer == "bytes":
        # The separator's name in a text is text, as it is to the run's own tokenizer.
        described["split_special_tokens"] = True
    files = {"tokenizer.json": content, "tokenizer_config.json": _json(described)}
    return ExportedTokenizer(tokenizer.separator, files)


def _bytes_as_file() -> dict[str, Any]:
    """The tokenizer "bytes" in the form of the `tokenizers` library: byte-level, no merges."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = False
    separator = {"id": BYTE_SEPARATOR, "content": _BYTE_SEPARATOR_NAME, "special": True}
    separator |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [separator],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_characters())},
            "merges": [],
        },
    }


def _characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte, as GPT-2 first had them."""
    found, others = [], 0
    for byte in range(256):
        if 33 <= byte <= 126 or (byte >= 161 and byte != 173):
            found.append(chr(byte))
        else:
            found.append(chr(256 + others))
            others += 1
    return found


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
