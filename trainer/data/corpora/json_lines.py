"""Texts in JSON: one object per line, or an array of objects, with the text under one key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from holdfast.parallel.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
"""The suffixes of files that are read as JSON Lines."""
ARRAY_SUFFIX = ".json"
"""The suffix of files that may be an array of objects."""
NAME_THE_KEY = (
    'name the one that has the text (data.json_key, or --json-key); "" takes JSON as plain text'
)
_BOM = b"\xef\xbb\xbf"
_KEYS_SHOWN = 8
_NAME_SHOWN = 40
"""The most characters of a key in a message."""


def is_json_lines(path: Path) -> bool:
    """Whether a file is read as JSON Lines, by its suffix."""
    return path.suffix.lower() in SUFFIXES


def begins_array(content: bytes) -> bool:
    """Whether the first sign of a file, of which this is the beginning, opens an array."""
    return content.removeprefix(_BOM).lstrip().startswith(b"[")


def json_documents(lines: Iterable[bytes], where: str, key: str) -> Iterator[bytes]:
    """The text under `key` of each line, as UTF-8; empty texts and blank lines are left out.

    Other keys may hold anything that Python's json writes, NaN included. A byte-order mark before a
    line does not matter.

    Args:
        where: the file, for messages.
    Raises:
        DataError: a line is no JSON object, or has no text under `key`.
    """
    for number, line in enumerate(lines, start=1):
        content = line.removeprefix(_BOM).strip()
        if content:
            yield from _text(_object(content), f"{where}, line {number}", key)


def record_documents(records: Iterable[Any], where: str, key: str) -> Iterator[bytes]:
    """The text under `key` of each value in a file, as UTF-8; empty texts are left out.

    Args:
        records: as from `json_records`.
        where: the file, for messages.
    Raises:
        DataError: one is no object, or has no text under `key`.
    """
    for number, record in enumerate(records, start=1):
        yield from _text(record, f"{where}, record {number}", key)


def json_records(content: bytes) -> list[Any] | None:
    """The values in the array that a whole file is, or its one object; None: it is neither."""
    text = content.removeprefix(_BOM).strip()
    if not text.startswith((b"[", b"{")):
        return None
    found = _value(text)
    return [found] if isinstance(found, dict) else found


def looks_like_json_lines(content: bytes) -> bool:
    """Whether every line that is not blank is a JSON object, and there are two or more."""
    if not content.removeprefix(_BOM).lstrip().startswith(b"{"):
        return False
    count = 0
    for line in content.splitlines():
        text = line.removeprefix(_BOM).strip()
        if text and _object(text) is None:
            return False
        count += bool(text)
    return count > 1


def _text(record: Any, where: str, key: str) -> Iterator[bytes]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: is not a JSON object; correct it, or leave it out")
    if key not in record:
        keys = ", ".join(json.dumps(name[:_NAME_SHOWN]) for name in list(record)[:_KEYS_SHOWN])
        raise DataError(f'{where}: has no "{key}"; its keys are {keys or "none"}: {NAME_THE_KEY}')
    text = record[key]
    if not isinstance(text, str):
        raise DataError(
            f'{where}: "{key}" is of type {type(text).__name__}, and a document is a text; '
            "correct it, or name another key (data.json_key, or --json-key)"
        )
    if text:
        yield text.encode("utf-8", errors="replace")


def _object(content: bytes) -> dict[str, Any] | None:
    """The object in a line; None if the line is none."""
    found = _value(content) if content.startswith(b"{") else None
    return found if isinstance(found, dict) else None


def _value(content: bytes) -> Any:
    """The value that UTF-8 text stands for; None if it is no JSON."""
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # NaN, infinities and lone surrogates are written by Python's json.
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return None
