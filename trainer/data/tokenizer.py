"""Tokenizers: plain bytes, or any `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

import numpy as np

from holdfast.checkpoint.format import expanded
from holdfast.parallel.errors import DataError
from holdfast.parallel.reading import read_regular

if TYPE_CHECKING:
    import tokenizers

    from holdfast.trainer.config import DataConfig

BYTE_SEPARATOR = 256
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
        raise DataError(
            f'model.vocab = {vocab}: data.tokenizer = "{name}" has the token ids 0 to '
            f"{tokenizer.vocab - 1}; set model.vocab to {tokenizer.vocab} or more, or leave it out"
        )


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
