"""A person's request to take steps back, as a file in the run's folder. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.parallel.output import write_whole
from holdfast.parallel.reading import decode_json, read_regular

MOST_SAMPLES = 256
"""The samples of one request, at most."""
_MOST_BYTES = 1 << 16


class RewindRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The steps to take back, and the samples to go on without."""

    name: Annotated[str, Meta(pattern="^[0-9a-f]{1,15}$")]
    """By which its answer among the events is known."""
    steps: Annotated[int, Meta(ge=1, le=2**53)]
    samples: Annotated[list[Annotated[int, Meta(ge=0, le=2**53)]], Meta(max_length=MOST_SAMPLES)]


def ask(path: Path, request: RewindRequest) -> None:
    """Write a request.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, msgspec.json.encode(request))


def take_request(path: Path) -> RewindRequest | None:
    """Read a request, and remove its file; None: there is none that can be read."""
    try:
        found = decode_json(read_regular(path, _MOST_BYTES, own=True), RewindRequest)
    except (OSError, ValueError):
        found = None
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return None  # it would be taken again after each step
    return found
