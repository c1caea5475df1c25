"""The smallest configuration, in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

SMALLEST = '[model]\nfamily = "llama"\nlayers = 6\nhidden = 96\n'


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(SMALLEST)
    return path
