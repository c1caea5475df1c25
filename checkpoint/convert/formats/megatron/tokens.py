"""The number of tokens that a model's vocabulary has, from Megatron's arguments. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

ADDED_TOKENS: Final[Mapping[str, int]] = {
    "NullTokenizer": 1,
    "NullMultimodalTokenizer": 1,
    "TikTokenizer": 0,
}
"""The tokens that a tokenizer adds to `vocab_size`, by `tokenizer_type`. The null tokenizers add
the end of a document. Every other tokenizer counts the tokens of its own file."""
_DEFAULT: Final[Mapping[str, int]] = {"TikTokenizer": 2**17}
"""The vocabulary of a tokenizer without `vocab_size`."""


def token_count(arguments: Mapping[str, Any]) -> int | None:
    """The tokens of a vocabulary without padding; None if the arguments do not tell it.

    Without a `tokenizer_type` it is `vocab_size`. A tokenizer with a file of its own ignores
    `vocab_size`.
    """
    kind, size = arguments.get("tokenizer_type"), arguments.get("vocab_size")
    if kind is None:
        return size
    if kind not in ADDED_TOKENS:
        return None
    size = size or _DEFAULT.get(kind)
    return None if size is None else int(size) + ADDED_TOKENS[kind]


def told_vocabulary(arguments: Mapping[str, Any], tokens: int) -> int:
    """The `vocab_size` that gives a vocabulary of so many tokens."""
    return tokens - ADDED_TOKENS.get(str(arguments.get("tokenizer_type")), 0)
