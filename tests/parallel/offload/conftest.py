"""Offloaders of the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.parallel.offload import Offloader
from support.runs.offloaded import BYTES


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Offloader]]:
    """Offloaders that are closed at the end."""
    made: list[Offloader] = []

    def make(path: Path | None = tmp_path, **settings: Any) -> Offloader:
        offloader = Offloader(path, smallest_bytes=BYTES, **settings)
        made.append(offloader)
        return offloader

    yield make
    for offloader in made:
        offloader.close()
