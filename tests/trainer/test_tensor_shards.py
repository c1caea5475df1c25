"""Tensor shards: any tensor degree that divides them, with the bits of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.trainer.config.rules import problems_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault
from support.runs.layouts import in_slices, tiny
from support.runs.small_runs import (
    findings_of,
    make_config,
    metrics_of,
    run_training,
    world_size_of,
)

SHARDS = {"tensor_shards": 4}
STEPS = 2
"""The second begins with what the first has changed."""
LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 4},
    {"tensor": 2, "data": 2, "shard": "parameters"},
    {"tensor": 2, "data": 2, "pipeline": 2, "schedule": "zb-h1"},
    {"tensor": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v", "data": 2, "shard": "gradients"},
]
IN_SLICES: list[dict[str, Any]] = [
    {"context": 2},
    {"tensor": 2, "context": 2, "data": 2},
    {"tensor": 4, "context": 2, "context_exchange": "keys"},
]
"""Every other one with each precision: tests/trainer/test_layout_pairs.py has the pairs."""


def run_of(layout: dict[str, Any], precision: str = "fp32", **sections: Any) -> Any:
    train = {"steps": STEPS, "seq_len": 32, "global_batch": 4, "precision": precision}
    return make_config(
        model={"layers": 4, "vocab": 67, **sections.pop("model", {})},
        train={**train, **sections.pop("train", {})},
        numerics=SHARDS,
        parallel=layout,
        **sections,
    )


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("precision", "kv_heads"), [("fp32", 1), ("bf16", 4)])
def test_layouts_give_the_bits_of_one_process(
    cluster: Cluster, precision: str, kv_heads: int
) -> None:
    """With fewer key and value heads than shards, several shards have one in common."""
    model = {"kv_heads": kv_heads}
    alone = run_training(cluster, run_of({}, precision, model=model))
    for layout in LAYOUTS[precision == "bf16" :: 2]:
        assert run_training(cluster, run_of(layout, precision, model=model)) == alone, layout


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slices_and_documents_divide_likewise(cluster: Cluster, precision: str) -> None:
    sections: dict[str, Any] = {
        "model": {"tie_embeddings": True, "layers": 2},
        "train": {"context_chunks": 4, "vocab_chunk": 9},
        "data": {"packing": "documents"},
    }
    alone = run_training(cluster, run_of({}, precision, **sections))
    for layout in IN_SLICES[precision == "bf16" :: 2]:
        assert run_training(cluster, run_of(layout, precision, **sections)) == alone, layout


@pytest.mark.mp
@pytest.mark.slow
def test_recompute_changes_no_bit(cluster: Cluster) -> None:
    model = {"layers": 2}
    alone = run_training(cluster, run_of({}, model=model))
    for tensor, recompute in ((1, "selective"), (2, "selective"), (2, "full")):
        config = run_of({"tensor": tensor}, model=model, train={"recompute": recompute})
        assert run_training(cluster, config) == alone, (tensor, recompute)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kv_heads"),
    [
        ({}, 1),
        ({"tensor": 2, "data": 2, "pipeline": 2}, 4),
        ({"tensor": 4, "context": 2}, 1),
        ({"tensor": 4, "context": 2}, 4),
    ],
    ids=str,
)
def test_layouts_equal_autograd_in_float64(
    cluster: Cluster, layout: dict[str, Any], kv_heads: int
) -> None:
    config = in_slices(tiny(layout, {"kv_heads": kv_heads}), 2)
    numerics = msgspec.structs.replace(config.numerics, tensor_shards=4)
    config = msgspec.structs.replace(config, numerics=numerics)
    assert findings_of(cluster, config) == []


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["backward", "gather"])
def test_a_loss_in_a_tensor_group_changes_no_bit(
    cluster: Cluster, start: Starter, phase: str
) -> None:
    train = {"steps": 5, "global_batch": 4, "seq_len": 32}
    model = {"layers": 2, "kv_heads": 1}
    expected = bits_of(
        run_training(cluster, make_config(model=model, train=train, numerics=SHARDS))
    )
    run = start(
        model=model,
        train=train,
        numerics=SHARDS,
        parallel={"tensor": 2, "data": 2},
        elastic={"respawn": False, "chaos": [fault("kill", 2, 3, phase)]},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [{"kv_heads": 1}, {"kv_heads": 4}, {"family": "gpt2", "kv_heads": 0}], ids=str
)
def test_a_killed_run_resumes_with_another_tensor_degree(
    cluster: Cluster, tmp_path: Path, model: dict[str, Any]
) -> None:
    """A rank with several parts of a matrix saves them, by rows or columns, and loads them."""
    sections: dict[str, Any] = {
        "model": {"layers": 2, **model},
        "train": {"steps": 6},
        "checkpoint": {"every": 2},
    }

    def train(layout: dict[str, Any], name: str, **more: Any) -> None:
        config = run_of(layout, "fp32", **{key: dict(keys) for key, keys in sections.items()})
        cluster.run(
            "support.runs.small_runs:train_in",
            world_size_of(config),
            config=msgspec.to_builtins(config),
            root=str(tmp_path / name),
            **more,
        )

    train({}, "whole")
    with pytest.raises(Exception, match=r"\S"):
        train({"data": 2, "shard": "parameters"}, "parts", kill=(1, 3))
    with pytest.raises(Exception, match=r"\S"):
        train({"tensor": 4, "data": 2}, "parts", kill=(1, 5))
    train({"tensor": 2, "pipeline": 2}, "parts")
    told = [
        [(line["loss_hex"], line["grad_norm_hex"]) for line in metrics_of(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 6


@pytest.mark.parametrize(
    ("shards", "layout", "said"),
    [
        (3, {}, "is not a power of two"),
        (2, {"tensor": 4}, "parallel.tensor = 4 does not divide numerics.tensor_shards = 2"),
        (4, {"sequence_parallel": False}, "needs parallel.sequence_parallel = true"),
        (8, {}, "model.heads = 4 is not divisible by numerics.tensor_shards = 8; every shard"),
        (32, {}, "a slice has 16 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(shards: int, layout: dict[str, Any], said: str) -> None:
    problems = problems_of(make_config(numerics={"tensor_shards": shards}, parallel=layout))
    assert any(said in problem for problem in problems), problems
