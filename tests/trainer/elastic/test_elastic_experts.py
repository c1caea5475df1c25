"""Ranks that have experts are lost and replaced within the step; no bit changes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.trainer.reports.metrics import load_of
from support.oracles.transformers_models import DEEPSEEK
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault, pace
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

SECTIONS: dict[str, Any] = {
    "model": {
        **DEEPSEEK,
        "layers": 1,
        "dense_layers": [],
        "experts": 16,
        "expert_intermediate": 24,
        "router_aux_loss_coef": 0.1,
        "router_bias_speed": 0.05,
    },
    "train": {"steps": 5, "global_batch": 4, "seq_len": 32},
    "numerics": {"tensor_shards": 4},
}
KILLS = [(1, 2, "compute"), (6, 3, "backward"), (3, 5, "reduce")]


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(**SECTIONS)))


@pytest.fixture(scope="module")
def loads(cluster: Cluster) -> list[dict[str, float]]:
    """Of each step, by layer, the choices of the expert with most, over the mean."""
    config = msgspec.to_builtins(make_config(**SECTIONS))
    job = "support.runs.expert_runs:train_counting"
    [steps] = cluster.run(job, 1, timeout_s=120.0, config=config)
    return [{f"block.{n}": load_of(of[n + 1]).most for n in range(1)} for of in steps]


@pytest.mark.parametrize("respawn", [True, False], ids=["replaced", "not replaced"])
def test_three_of_eight_ranks_with_experts_are_lost(
    start: Starter,
    expected: dict[str, Any],
    loads: list[dict[str, float]],
    respawn: bool,
) -> None:
    """Each tensor rank has 4 of 16 experts; smaller groups have theirs too. No token is counted
    twice, or not at all, in the steps that are interrupted."""
    run = start(
        **SECTIONS,
        parallel={"tensor": 4, "data": 2},
        elastic=pace(
            {
                "respawn": respawn,
                "local_nodes": 4,
                "chaos": [fault("kill", rank, step, phase) for rank, step, phase in KILLS],
            },
            1.0 if respawn else 0.1,
        ),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert [step["expert_load"] for step in run.steps()] == loads
    assert len(run.events("rank_lost")) >= 3
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))
