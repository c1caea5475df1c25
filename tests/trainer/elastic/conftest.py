"""What tests of the elastic loop share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.trainer.config import RunConfig, load_config
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Undisturbed, bits_of
from support.runs.fake_cluster import CONFIG
from support.runs.small_runs import make_config, run_training


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "run.toml").write_text(CONFIG)
    return load_config(tmp_path / "run.toml", [])


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What a run of fixed ranks with these sections gives; each is trained once."""
    found: dict[bytes, dict[str, Any]] = {}

    def bits(**sections: dict[str, Any]) -> dict[str, Any]:
        config = make_config(**sections)
        key = msgspec.json.encode(config)
        if key not in found:
            found[key] = bits_of(run_training(cluster, config))
        return found[key]

    return bits
