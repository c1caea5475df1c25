"""The vocabulary of a model whose `model.vocab` is unset: that of its data's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.checkpoint.format import expanded
from holdfast.parallel.errors import ConfigError, DataError
from holdfast.parallel.reading import Count, decode_json, read_regular

if TYPE_CHECKING:
    from holdfast.trainer.config.data_section import DataConfig

BYTE_VOCAB = 257
"""The token ids of byte text: 256 bytes, and the separator of documents."""
_MULTIPLE = 64
"""What the number of ids is rounded up to, for kernels and for tensor ranks that share them."""


class _Added(msgspec.Struct):
    id: Count


class _Model(msgspec.Struct):
    vocab: dict[str, Count] | list[Any]
    """An id for each token; of a unigram model a list of tokens, whose ids are their places."""


class _TokenizerFile(msgspec.Struct):
    """The part of a `tokenizer.json` that tells its ids."""

    model: _Model
    added_tokens: list[_Added] | None = None


def default_vocab(data: DataConfig) -> int:
    """The token ids of the data's tokenizer, rounded up to a multiple of 64.

    For synthetic data and Megatron's files, which name no tokenizer, it is that of byte text.
    Local: of another tokenizer than "bytes", the file is read.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    ids = BYTE_VOCAB
    if data.kind == "text" and data.tokenizer != "bytes":
        ids = tokenizer_vocab(data.tokenizer)
    return -(-ids // _MULTIPLE) * _MULTIPLE


def vocab_problem(data: DataConfig, vocab: int) -> str:
    """The problem of a vocabulary below the tokenizer's; empty if there is none. Local.

    A file that cannot be read here is none: a run may be planned where its data is not.
    """
    if data.kind != "text" or data.tokenizer == "bytes":
        return ""
    try:
        ids = tokenizer_vocab(data.tokenizer)
    except ConfigError:
        return ""
    return "" if vocab >= ids else too_few_ids(vocab, data.tokenizer, ids)


def too_few_ids(vocab: int, tokenizer: str, ids: int) -> str:
    """The message on a vocabulary below the ids of a tokenizer of this name. Pure."""
    return (
        f'model.vocab = {vocab}: data.tokenizer = "{tokenizer}" has the token ids 0 to {ids - 1}; '
        f"set model.vocab to {ids} or more, or leave it out"
    )


def tokenizer_vocab(name: str) -> int:
    """One more than the largest id in a `tokenizer.json`, as its library counts them. Local.

    The library is not imported: every start of a command would wait for it.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    told = f'data.tokenizer = "{name}"'
    allowed = 'allowed are "bytes" and the path of a tokenizer.json'
    try:
        file = decode_json(read_regular(expanded(name, "data.tokenizer")), _TokenizerFile)
    except OSError as error:
        raise DataError(f"{told}: cannot be read ({error.strerror}); {allowed}") from error
    except ValueError as error:
        raise DataError(f"{told}: is no tokenizer ({error}); {allowed}") from error
    vocab = file.model.vocab
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    added = (token.id for token in file.added_tokens or ())
    return max(max(ids, default=-1), max(added, default=-1)) + 1
