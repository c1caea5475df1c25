"""JSON Lines: one object per line, the text of a document under one of its keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from holdfast.parallel.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
"""The suffixes of files that are read as JSON Lines."""
_BOM = b"\xef\xbb\xbf"
_KEYS_SHOWN = 8


def is_json_lines(path: Path) -> bool:
    """Whether a file is read as JSON Lines, by its suffix."""
    return path.suffix.lower() in SUFFIXES


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
        if not content:
            continue
        found = _object(content)
        if found is None:
            raise DataError(
                f"{where}, line {number}: is not a JSON object; correct the line, or leave it out"
            )
        if key not in found:
            keys = ", ".join(f'"{name}"' for name in list(found)[:_KEYS_SHOWN]) or "none"
            raise DataError(
                f'{where}, line {number}: has no "{key}"; its keys are {keys}: name the one that '
                "has the text (data.json_key, or --json-key)"
            )
        text = found[key]
        if not isinstance(text, str):
            raise DataError(
                f'{where}, line {number}: "{key}" is of type {type(text).__name__}, and a '
                "document is a text; correct the line, or name another key (data.json_key, or "
                "--json-key)"
            )
        if text:
            yield text.encode("utf-8", errors="replace")


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


def _object(content: bytes) -> dict[str, Any] | None:
    """The object in a line; None if the line is none."""
    if not content.startswith(b"{"):
        return None
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # NaN, infinities and lone surrogates are written by Python's json.
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return None
    return found if isinstance(found, dict) else None
