"""Ranks are lost in steps whose largest logits scale the heads of all; no bit changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault, pace
from support.runs.small_runs import make_config, metrics_of, run_in, run_training

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

SECTIONS: dict[str, Any] = {
    "model": {"layers": 2, "heads": 8, "kv_heads": 8, "family": "qwen2"},
    "train": {"steps": 5, "global_batch": 4, "seq_len": 32, "context_chunks": 2},
    "numerics": {"tensor_shards": 2},
    "optimizer": {"name": "muon", "lr": 2e-3, "qk_clip": 3e-3},
}
KILLS = {
    "tensor": [(1, 2, "backward"), (2, 4, "reduce")],
    "context": [(3, 2, "reduce"), (0, 4, "gather")],
    "pipeline": [(2, 2, "backward"), (1, 4, "reduce")],
}


@pytest.mark.parametrize("axis", KILLS)
def test_losses_change_no_logit_that_clips(
    start: Starter, cluster: Cluster, tmp_path: Path, axis: str
) -> None:
    """What the lost ranks have noted is noted again, and what others have is not forgotten."""
    config = make_config(**SECTIONS)
    run_in(cluster, config, tmp_path / "alone")
    expected = [line["attention_logit"] for line in metrics_of(tmp_path / "alone")]
    chaos = [fault("kill", rank, step, phase) for rank, step, phase in KILLS[axis]]
    run = start(
        **SECTIONS,
        parallel={axis: 2, "data": 2},
        elastic=pace({"respawn": False, "min_ranks": 1, "local_nodes": 4, "chaos": chaos}, 0.1),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == bits_of(run_training(cluster, config))
    assert [line["attention_logit"] for line in run.steps()] == expected
    assert len(run.events("rank_lost")) == len(chaos)
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))
