"""What tests of whole runs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.runs.elastic_runs import Starter


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Starts elastic runs; what is left of them at the end of the test is ended."""
    starter = Starter(tmp_path)
    yield starter
    starter.close()
