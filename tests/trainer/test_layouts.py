"""Layouts of up to eight ranks compute what one process computes, in float64: all in a soak; else
every pair of a degree of tensor and data, a number of stages, and one of chunks per rank.

That schedules, recomputing and sharing change no bit of a tensor group or of one process is shown
for all pairs by tests/trainer/test_layout_pairs.py.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import msgspec
import pytest

from holdfast.trainer.check.compare import compare
from holdfast.trainer.config import RunConfig
from support.processes.cluster import Cluster
from support.runs.covering import Choice, Cost, Factor, choices, covering_array, pairs_of
from support.runs.layout_factors import MOST_RANKS, ranks_of
from support.runs.layouts import tiny
from support.runs.small_runs import reference_of, world_size_of

pytestmark = [pytest.mark.mp, pytest.mark.slow]

IS_SOAK = "HOLDFAST_SOAK_S" in os.environ


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


FACTORS = (
    Factor("tensor", (1, 2, 4, 8)),
    Factor("pipeline", tuple(range(1, MOST_RANKS + 1))),
    Factor("data", tuple(range(1, MOST_RANKS + 1))),
    Factor("virtual", (1, 2), lambda chosen: chosen["pipeline"] != 1),
)


def has_few_ranks(choice: Choice) -> bool:
    return ranks_of(choice) <= MOST_RANKS


def cost_of(choice: Choice) -> Cost:
    """About what a run costs: operators of layers, and messages in tensor groups."""
    chunks = int(choice["pipeline"]) * int(choice.get("virtual", 1))
    tensor, data = int(choice["tensor"]), int(choice["data"])
    return Cost(tensor * tensor * data + 2 * int(choice["pipeline"]) * data + chunks)


@cache
def pairwise() -> list[Choice]:
    return covering_array(choices(FACTORS, has_few_ranks), cost_of)


def as_layout(choice: Choice) -> dict[str, Any]:
    if choice.get("virtual", 1) == 1:
        return dict(choice)
    return {**choice, "schedule": "interleaved-1f1b"}


def test_every_two_values_occur_together() -> None:
    wanted = {pair for choice in choices(FACTORS, has_few_ranks) for pair in pairs_of(choice)}
    array = pairwise()
    assert {pair for choice in array for pair in pairs_of(choice)} == wanted
    assert all(map(has_few_ranks, array))


@pytest.mark.parametrize(
    "choice",
    list(choices(FACTORS, has_few_ranks)) if IS_SOAK else pairwise(),
    ids=lambda v: "-".join(map(str, v.values())),
)
def test_layout_agrees_with_one_process(cluster: Cluster, choice: Choice) -> None:
    agree(cluster, tiny(as_layout(choice), {"dropout": 0.1}))


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
    ({"tensor": 2, "pipeline": 2, "sequence_parallel": False, "schedule": "zb-h1"}, {}),
    ({"tensor": 2}, {"vocab": 19}),
    ({"tensor": 4, "sequence_parallel": False}, {"vocab": 19, "intermediate": 23}),
    ({"pipeline": 2}, {"tie_embeddings": True}),
    ({"tensor": 2, "pipeline": 2, "data": 2}, {"tie_embeddings": True}),
    ({"pipeline": 2, "virtual": 2, "schedule": "zb-v", "data": 3}, {"tie_embeddings": True}),
    ({"pipeline": 2, "virtual": 2, "schedule": "gpipe", "data": 2}, {}),
    ({"pipeline": 3, "virtual": 2, "schedule": "zb-v"}, {}),
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


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [({"tensor": 2}, "full"), ({"tensor": 2, "pipeline": 2, "schedule": "zb-h1"}, "selective")],
    ids=str,
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


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "data": 2, "pipeline": 2, "shard": "optimizer"},
        {"tensor": 2, "data": 2, "shard": "gradients"},
        {"data": 2, "pipeline": 2, "shard": "parameters"},
    ],
    ids=lambda v: v["shard"],
)
def test_fast_reduction_agrees(cluster: Cluster, layout: dict[str, Any]) -> None:
    config = tiny(layout, {"tie_embeddings": True})
    numerics = msgspec.structs.replace(config.numerics, reduction="fast")
    agree(cluster, msgspec.structs.replace(config, numerics=numerics))
