"""Experts over more ranks than the tensor axis have the bits of one process in every layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config.rules import problems_of
from support.oracles.transformers_models import DEEPSEEK
from support.processes.cluster import Cluster
from support.runs.small_runs import findings_of, make_config, run_training

pytestmark = [pytest.mark.mp, pytest.mark.slow]

MOE: dict[str, Any] = {
    "family": "qwen3_moe",
    "layers": 2,
    "heads": 8,
    "kv_heads": 2,
    "experts": 8,
    "experts_per_token": 3,
    "expert_intermediate": 24,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.01,
    "dropout": 0.1,
}
"""As many slices and shards as each group's layouts need."""
WHOLE: dict[str, Any] = {"model": MOE, "train": {"steps": 2, "global_batch": 6}}
DEEP = {**WHOLE, "model": MOE | {"layers": 4}}
INTERLEAVED = {"schedule": "interleaved-1f1b"}
SLICES = {**WHOLE, "train": {"steps": 2, "global_batch": 4, "seq_len": 32, "context_chunks": 4}}
SHARDS = {
    "model": MOE,
    "train": {"steps": 1, "global_batch": 4, "precision": "bf16", "context_chunks": 2}
    | {"seq_len": 32},
    "numerics": {"tensor_shards": 2},
}
BIASED = {
    "model": DEEPSEEK | {"heads": 8, "kv_heads": 8, "router_bias_speed": 0.1},
    "train": {"steps": 3, "global_batch": 4},
}
SECOND = {
    "model": DEEPSEEK | {"heads": 8, "kv_heads": 8, "multi_token_layers": 1},
    "train": {"steps": 2, "global_batch": 3},
}
MIXTRAL = {
    "model": {"family": "mixtral", "layers": 4, "experts": 4, "experts_per_token": 1},
    "train": {"steps": 2, "global_batch": 4, "z_loss_coef": 0.01},
    "data": {"packing": "documents"},
}
MUON: dict[str, Any] = {
    "model": MOE,
    "train": {"steps": 3, "global_batch": 4},  # the first update of a momentum is not the last
    "optimizer": {"name": "muon", "lr": 2e-3},
}
MUON_SHARDS = {**MUON, "numerics": {"tensor_shards": 2}}
MUON_BIASED = {**BIASED, "optimizer": MUON["optimizer"]}
LAYOUTS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (WHOLE, {"data": 4, "expert": 4}, {"recompute": "full"}),  # two replicas have one fewer
    (WHOLE, {"data": 4, "expert": 2}, {}),  # two teams
    (WHOLE, {"data": 4, "expert": 4, "expert_replicas": 2}, {}),
    (WHOLE, {"data": 3, "expert": 3}, {"recompute": "selective"}),  # 3, 3 and 2 experts
    (WHOLE, {"data": 4, "expert": 4, "pipeline": 2, "schedule": "zb-h1"}, {}),
    (DEEP, {"data": 2, "expert": 2, "pipeline": 2, "virtual": 2} | INTERLEAVED, {}),
    (SLICES, {"context": 4, "expert": 2}, {}),  # two copies of each expert
    (SLICES, {"context": 2, "data": 2, "expert": 4}, {"recompute": "full"}),
    (SLICES, {"data": 2, "expert": 2, "pipeline": 2, "stretches": 2}, {}),
    (SHARDS, {"tensor": 2, "data": 2, "expert": 4}, {"recompute": "full"}),
    (SHARDS, {"data": 4, "expert": 4}, {}),
    (SHARDS, {"tensor": 2, "context": 2, "data": 2, "expert": 8}, {}),
    (WHOLE, {"data": 4, "expert": 4, "shard": "gradients"}, {}),
    (WHOLE, {"data": 4, "expert": 2, "shard": "parameters"}, {"recompute": "full"}),
    (DEEP, {"data": 4, "expert": 4, "shard": "parameters", "pipeline": 2, "schedule": "zb-h1"}, {}),
    (SHARDS, {"tensor": 2, "data": 2, "expert": 4, "shard": "parameters"}, {}),
    (BIASED, {"data": 2, "expert": 2, "shard": "parameters"}, {}),
    (BIASED, {"data": 2, "expert": 2}, {"recompute": "full"}),
    (SECOND, {"data": 2, "expert": 2, "pipeline": 2}, {"recompute": "full"}),
    (MIXTRAL, {"data": 2, "expert": 2, "pipeline": 2, "schedule": "zb-v", "virtual": 2}, {}),
    (MUON, {"data": 4, "expert": 4}, {}),
    (MUON, {"data": 2, "expert": 2, "pipeline": 2}, {}),
    (MUON_SHARDS, {"tensor": 2, "data": 2, "expert": 4, "expert_replicas": 2}, {}),
    (MUON_SHARDS, {"data": 4, "expert": 4}, {}),
    (MUON_BIASED, {"data": 2, "expert": 2}, {}),
]


def config_of(group: dict[str, Any], parallel: dict[str, Any], train: dict[str, Any]) -> Any:
    config = make_config(**{**group, "train": group["train"] | train}, parallel=parallel)
    assert problems_of(config) == []
    return config


@cache
def _alone(cluster: Cluster, encoded: bytes) -> dict[str, Any]:
    config = msgspec.json.decode(encoded)
    return run_training(cluster, make_config(**config))


@pytest.mark.parametrize(("group", "parallel", "train"), LAYOUTS, ids=str)
def test_layouts_give_the_bits_of_one_process(
    cluster: Cluster, group: dict[str, Any], parallel: dict[str, Any], train: dict[str, Any]
) -> None:
    expected = _alone(cluster, msgspec.json.encode(group))
    assert run_training(cluster, config_of(group, parallel, train)) == expected


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize(
    "parallel", [{"data": 4, "expert": 4}, {"tensor": 2, "data": 2, "expert": 4}], ids=str
)
def test_a_checked_layout_equals_autograd(
    cluster: Cluster, parallel: dict[str, Any], reduction: str
) -> None:
    numerics = {"reduction": reduction}
    config = make_config(model=MOE, train={"global_batch": 6}, parallel=parallel, numerics=numerics)
    assert findings_of(cluster, tiny_config(config, 2)) == []


def test_held_out_losses_and_activations_on_a_drive(cluster: Cluster, tmp_path: Path) -> None:
    """Replicas that only host experts take part in evaluations, and have no activations."""
    group: dict[str, Any] = {
        "model": MOE,
        "train": {"steps": 2, "global_batch": 6, "eval_every": 1, "eval_batches": 1},
    }
    expected = run_training(cluster, make_config(**group))
    offload = {"activations": "ssd", "path": str(tmp_path), "smallest_kib": 1}
    spread = make_config(**group, parallel={"data": 4, "expert": 4}, offload=offload)
    assert run_training(cluster, spread) == expected
