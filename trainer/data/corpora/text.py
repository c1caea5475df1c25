"""Text corpora: files, tokenised once per machine, as one stream of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np

from holdfast.trainer.data.corpora.document_reading import form_for, read_documents
from holdfast.trainer.data.corpora.documents import DocumentFile, list_documents
from holdfast.trainer.data.corpora.json_lines import ARRAY_SUFFIX, is_json_lines
from holdfast.trainer.data.corpora.token_cache import (
    CachedTokens,
    TokenWriter,
    cached_tokens,
    found_tokens,
)
from holdfast.trainer.data.corpora.tokenizer import Tokenizer, load_tokenizer, require_vocab

# documents are handed to the tokenizer in groups of about this size, which it spreads over cores
GROUP_BYTES = 4 * 2**20


def text_stream(
    paths: Sequence[str],
    *,
    tokenizer: str,
    vocab: int,
    json_key: str = "text",
    end_of_text: str = "",
) -> CachedTokens:
    """The documents of the paths as one stream, each followed by the tokenizer's separator.

    Tokens are cached under the paths, sizes and modification times of the files and the content of
    the tokenizer.

    Args:
        paths: files and folders; none: the Python standard library.
        tokenizer: "bytes" or the path of a `tokenizer.json`.
        vocab: the vocabulary of the model; every id of the tokenizer has to be below it.
        json_key: the key of the text in JSON; "": JSON is plain text.
        end_of_text: the name of the tokenizer's separator; "": one of the known names.

    Raises:
        DataError: a file is unreadable or not UTF-8, or the tokenizer is bad or has more ids than
            the vocabulary.
    """
    encoder = load_tokenizer(tokenizer, end_of_text=end_of_text)
    require_vocab(encoder, tokenizer, vocab)
    files = list_documents(paths)
    form = form_for(encoder, json_key)

    def write(writer: TokenWriter) -> None:
        for tokens in encode_documents(read_documents(files, form=form), encoder):
            writer.append(tokens)

    return cached_tokens(
        _cache_key(files, encoder, json_key),
        name=stream_name(paths),
        vocab=encoder.vocab,
        write=write,
    )


def known_text(
    paths: Sequence[str], *, tokenizer: str, json_key: str = "text", end_of_text: str = ""
) -> CachedTokens | None:
    """The stream that `text_stream` gives, if the text has been tokenised on this machine.

    Raises:
        DataError: a file is missing, or the tokenizer is bad.
    """
    encoder = load_tokenizer(tokenizer, end_of_text=end_of_text)
    key = _cache_key(list_documents(paths), encoder, json_key)
    return found_tokens(key, name=stream_name(paths))


def _cache_key(files: Sequence[DocumentFile], encoder: Tokenizer, json_key: str) -> str:
    """The name of the entry of a corpus in the token cache."""
    state = [(_text(file.path.absolute()), file.size_bytes, file.modified_ns) for file in files]
    parts = ["text 1", encoder.fingerprint, encoder.separator, state]
    if any(is_json_lines(file.path) for file in files):
        parts += ["json lines 1", json_key]
    if any(file.path.suffix.lower() == ARRAY_SUFFIX for file in files):
        parts += ["json 1", json_key]
    if not json_key:
        parts += ["plain"]
    return blake2b(msgspec.json.encode(parts), digest_size=16).hexdigest()


def _text(path: Path) -> str:
    """The name of a path as text, whatever its bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def encode_documents(documents: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each document, its separator included, one array per document.

    They have the smallest type that holds the tokenizer's own and the separator's.
    """
    separator = tokenizer.separator
    ending = [] if separator is None else [separator]
    end = np.array(ending, dtype=np.min_scalar_type(separator or 0))
    for group in _groups(documents):
        for tokens in tokenizer.encode(group):
            yield np.concatenate([tokens, end])


def stream_name(paths: Sequence[str]) -> str:
    """The name of the corpus of these paths in messages."""
    if not paths:
        return "data.path [] (the Python standard library)"
    return f'data.path "{paths[0]}"' + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _groups(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size_bytes = 0
    for document in documents:
        group.append(document)
        size_bytes += len(document)
        if size_bytes >= GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group
