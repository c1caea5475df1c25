"""The texts in a configuration: paths, URLs and names that file systems and terminals can take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.checkpoint.format import local_path, place_fault, scheme_of
from holdfast.parallel.errors import ConfigError, shown

if TYPE_CHECKING:
    from holdfast.trainer.config.sections import RunConfig

_LONGEST = 4096
"""Linux's longest path, in bytes."""
_LONGEST_NAME = 255
"""The longest name of a file or folder, in bytes."""


def text_problems(config: RunConfig) -> Iterator[str]:
    """One line per text with control characters, of no encoding, or longer than a path. Pure."""
    for section, keys in msgspec.to_builtins(config).items():
        for key, value in keys.items():
            for name, text in _texts(f"{section}.{key}", value):
                if problem := _problem(text):
                    yield f"{name} = {shown(text)}: {problem}"


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in the value of a key, each with the name of its place."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, own in value.items():
            yield from _texts(f"{name}.{key}", own)
    elif isinstance(value, list):
        for number, own in enumerate(value):
            yield from _texts(name if isinstance(own, str) else f"{name}[{number}]", own)


def place_problems(config: RunConfig) -> Iterator[str]:
    """One line per place that is neither a path nor a URL, or a URL where none is taken. Pure."""
    path = config.checkpoint.path
    if fault := place_fault(path):
        yield f"checkpoint.path = {shown(path)}: {fault}"
    try:
        local_path(config.offload.path, "offload.path")
    except ConfigError as error:
        yield str(error)


def _problem(text: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        return "must not have control characters"
    try:
        written = text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8 text"
    if len(written) > _LONGEST:
        return f"has {len(written)} bytes; at most {_LONGEST}"
    name = 0 if scheme_of(text) else max(map(len, written.split(b"/")))
    return f"a name in it has {name} bytes; at most {_LONGEST_NAME}" if name > _LONGEST_NAME else ""
