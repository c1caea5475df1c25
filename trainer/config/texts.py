"""The texts in a configuration: paths and names that a file system and a terminal can take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from holdfast.parallel.errors import shown

if TYPE_CHECKING:
    from holdfast.trainer.config.sections import RunConfig

_LONGEST = 4096
"""Linux's longest path, in bytes."""


def text_problems(config: RunConfig) -> Iterator[str]:
    """One line per text with control characters, of no encoding, or longer than a path. Pure."""
    for section, keys in msgspec.to_builtins(config).items():
        for key, value in keys.items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and (problem := _problem(text)):
                    yield f"{section}.{key} = {shown(text)}: {problem}"


def _problem(text: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        return "must not have control characters"
    try:
        length = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not UTF-8 text"
    return f"has {length} bytes; at most {_LONGEST}" if length > _LONGEST else ""
