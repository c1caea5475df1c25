"""The lines of metrics.jsonl and events.jsonl. Torn and foreign ones are set aside, not fatal."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdfast.parallel.files import open_added
from holdfast.parallel.output.appended_file import set_aside_name
from holdfast.parallel.output.whole_files import write_whole
from holdfast.parallel.reading import parse_json, read_regular

_MOST_BYTES = 1 << 32
"""The largest file of lines that is read: the metrics of some million steps."""
_MOST_STEPS = 1 << 53
"""More than any run has."""


def json_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines with their line ends, and the objects in them; None: torn, or no JSON object."""
    for line in io.BytesIO(content):
        try:
            value = parse_json(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        yield line, value if isinstance(value, dict) else None


def content_of(path: Path, *, follow: bool = True) -> bytes:
    """The content of a file of lines; empty without a file. It does not wait for a FIFO's writer.

    Args:
        follow: whether `path` may be a link.
    Raises:
        OSError: it cannot be read, is no regular file, or is larger than any run's.
    """
    try:
        return read_regular(path, _MOST_BYTES, follow=follow)
    except FileNotFoundError:
        return b""


def step_of(record: dict[str, Any] | None) -> int:
    """The step of a line of metrics.jsonl; 0 if it is none."""
    step = (record or {}).get("step")
    is_number = isinstance(step, int) and not isinstance(step, bool)
    return step if is_number and 0 < step <= _MOST_STEPS else 0


def rising_steps() -> Callable[[dict[str, Any]], bool]:
    """A test of the lines of metrics.jsonl, in order: whether each is later than those before."""
    last = 0

    def belongs(record: dict[str, Any]) -> bool:
        nonlocal last
        step = step_of(record)
        if step <= last:
            return False
        last = step
        return True

    return belongs


def is_event(record: dict[str, Any] | None) -> bool:
    """Whether a line of JSON is an event."""
    return record is not None and isinstance(record.get("event"), str)


def set_foreign_lines_aside(path: Path, belongs: Callable[[dict[str, Any]], bool]) -> str:
    """Move lines that do not belong to a file of JSON lines to a file beside it.

    The only process that uses the file calls it.

    Args:
        belongs: whether an object is a record of this file; called once for each, in order.
    Returns:
        A note for the user; empty if all lines belong.
    Raises:
        OSError: the file cannot be read or is a link, or one of both cannot be written.
    """
    kept, foreign = [], []
    for line, value in json_lines(content_of(path, follow=False)):
        (kept if value is not None and belongs(value) else foreign).append(line)
    if not foreign:
        return ""
    aside = path.with_name(set_aside_name(path.name))
    with os.fdopen(open_added(aside), "ab") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in foreign)
    write_whole(path, b"".join(kept))
    lines = "1 line is" if len(foreign) == 1 else f"{len(foreign)} lines are"
    return f"{path}: {lines} torn or no record of a run; moved to {aside.name}"
