"""What tests of the elastic loop share."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.trainer.config import RunConfig, load_config
from support.runs.fake_cluster import CONFIG


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "run.toml").write_text(CONFIG)
    return load_config(tmp_path / "run.toml", [])
