"""The tokenizer of a run's text as files that transformers loads, with the same ids."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint.format import expanded
from holdfast.parallel.reading import read_regular
from holdfast.trainer.data.tokenizer import BYTE_SEPARATOR, FileTokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.trainer.config import DataConfig

_BYTE_SEPARATOR_NAME = "<|endoftext|>"


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
