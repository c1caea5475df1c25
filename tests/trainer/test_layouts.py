"""Every layout of up to eight ranks computes what one process computes, in float64."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.trainer.check.compare import compare
from holdfast.trainer.config import RunConfig
from support.processes.cluster import Cluster
from support.runs.layouts import all_layouts, tiny
from support.runs.small_runs import reference_of, world_size_of

pytestmark = [pytest.mark.mp, pytest.mark.slow]


def agree(cluster: Cluster, config: RunConfig) -> None:
    """Loss within 1e-12, gradients, norm and parameters after all steps within 1e-10."""
    reference = reference_of(config)
    plain = msgspec.to_builtins(config)
    ranks = cluster.run(
        "support.runs.small_runs:check_layout", world_size_of(config), config=plain, timeout_s=110
    )
    findings = compare(ranks, reference)
    assert findings == [], [str(finding) for finding in findings]
    seen = {piece.name for rank in ranks for piece in rank.gradients}
    assert seen == {piece.name for piece in reference.gradients}


@pytest.mark.parametrize(
    "layout", list(all_layouts()), ids=lambda v: "-".join(map(str, v.values()))
)
def test_layout_agrees_with_one_process(cluster: Cluster, layout: dict[str, Any]) -> None:
    agree(cluster, tiny(layout, {"dropout": 0.1}))


@pytest.mark.parametrize(
    "layout",  # where a model is cut into stages does nothing to its dropout
    [{"tensor": tensor, "data": data} for tensor, data in ((1, 1), (1, 4), (2, 2), (4, 1))],
    ids=lambda v: "-".join(map(str, v.values())),
)
def test_layout_without_dropout_agrees_with_one_process(
    cluster: Cluster, layout: dict[str, Any]
) -> None:
    agree(cluster, tiny(layout, {"dropout": 0.0}))


OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tensor": 2, "sequence_parallel": False}, {}),
    ({"tensor": 4, "sequence_parallel": False}, {}),
    ({"tensor": 2, "pipeline": 2, "sequence_parallel": False, "schedule": "zb-h1"}, {}),
    ({"tensor": 2}, {"vocab": 19}),
    ({"tensor": 4, "sequence_parallel": False}, {"vocab": 19, "intermediate": 23}),
    ({"pipeline": 2}, {"tie_embeddings": True}),
    ({"tensor": 2, "pipeline": 2, "data": 2}, {"tie_embeddings": True}),
    ({"pipeline": 2, "virtual": 2, "schedule": "zb-v", "data": 3}, {"tie_embeddings": True}),
    ({"pipeline": 4, "schedule": "gpipe"}, {}),
    ({"pipeline": 2, "virtual": 2, "schedule": "gpipe", "data": 2}, {}),
    ({"pipeline": 4, "schedule": "zb-h1", "data": 2}, {}),
    ({"tensor": 2, "pipeline": 2, "schedule": "zb-h1", "data": 2}, {}),
    ({"pipeline": 3, "virtual": 2, "schedule": "zb-v"}, {}),
    ({"tensor": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v"}, {}),
    ({"pipeline": 2, "blocks_per_chunk": [3, 1]}, {"layers": 4}),
    ({"pipeline": 3, "blocks_per_chunk": [0, 2, 2]}, {"layers": 4}),
    ({"data": 3, "pipeline": 2, "micro_batch_order": "shuffled"}, {}),
    ({"data": 4, "shard": "gradients", "shard_group": 2}, {"tie_embeddings": True}),
    ({"tensor": 2, "data": 2, "shard": "parameters"}, {"tie_embeddings": True}),
    ({"pipeline": 2, "data": 2, "schedule": "zb-h1", "shard": "parameters"}, {}),
    ({"tensor": 2, "data": 2, "shard": "gradients"}, {"kv_heads": 1}),
    ({"tensor": 4, "data": 2, "shard": "parameters"}, {"kv_heads": 2}),
]


@pytest.mark.parametrize(("layout", "model"), OTHERS, ids=lambda v: "-".join(map(str, v.values())))
def test_other_schedules_splits_and_models_agree(
    cluster: Cluster, layout: dict[str, Any], model: dict[str, Any]
) -> None:
    agree(cluster, tiny(layout, model))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"tensor": 2, "pipeline": 2, "schedule": "zb-h1"}], ids=str
)
def test_recompute_agrees(cluster: Cluster, layout: dict[str, Any], recompute: str) -> None:
    config = tiny(layout, {})
    train = msgspec.structs.replace(config.train, recompute=recompute)
    agree(cluster, msgspec.structs.replace(config, train=train))


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "sequence_parallel": False},
        {"tensor": 2, "pipeline": 2, "schedule": "zb-h1"},
        {"data": 2},
    ],
    ids=str,
)
def test_a_loss_by_chunks_of_the_vocabulary_agrees(
    cluster: Cluster, layout: dict[str, Any]
) -> None:
    config = tiny(layout, {"tie_embeddings": True, "vocab": 19})
    train = msgspec.structs.replace(config.train, vocab_chunk=4)
    agree(cluster, msgspec.structs.replace(config, train=train))


@pytest.mark.parametrize("shard", ["optimizer", "gradients", "parameters"])
def test_fast_reduction_agrees(cluster: Cluster, shard: str) -> None:
    layout = {"tensor": 2, "data": 2, "pipeline": 2, "shard": shard}
    config = tiny(layout, {"tie_embeddings": True})
    numerics = msgspec.structs.replace(config.numerics, reduction="fast")
    agree(cluster, msgspec.structs.replace(config, numerics=numerics))
