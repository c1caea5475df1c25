"""What tests of the command share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs.commands import CONFIG


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path
