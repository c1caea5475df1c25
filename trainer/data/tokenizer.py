"""Tokenizers: plain bytes, or any `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from holdfast.parallel.errors import DataError

if TYPE_CHECKING:
    import tokenizers

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

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document (valid UTF-8), one-dimensional, without the separator."""
        ...


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """Token ids are the bytes of the UTF-8 text; id 256 ends a document."""

    vocab: int = 257
    separator: int | None = BYTE_SEPARATOR
    fingerprint: str = "bytes"

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

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document: int64[tokens]; several documents at once use several cores."""
        texts = [document.decode("utf-8") for document in documents]
        encodings = self.model.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def load_tokenizer(name: str, *, key: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer "bytes", or that of a `tokenizer.json` file; `key` is its name in messages.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    allowed = 'allowed are "bytes" and the path of a tokenizer.json'
    try:
        content = path.read_bytes()
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
    ids = (model.token_to_id(separator) for separator in SEPARATOR_NAMES)
    separator = next((found for found in ids if found is not None), None)
    vocab = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return FileTokenizer(vocab, separator, blake2b(content, digest_size=16).hexdigest(), model)
