"""Tensor shards: any tensor degree that divides them, with the bits of one process.

tests/trainer/test_layout_pairs.py has every pair of layout, slices, documents and recomputing.
"""

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
    run_in,
    run_training,
)
from support.runs.undisturbed import Undisturbed

SHARDS = {"tensor_shards": 4}
STEPS = 2
"""The second begins with what the first has changed."""


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What one process computes, each run once."""
    return Undisturbed(cluster)


def run_of(layout: dict[str, Any], precision: str = "fp32", **sections: Any) -> Any:
    train = {"steps": STEPS, "seq_len": 32, "global_batch": 2, "precision": precision}
    return make_config(
        model={"layers": 2, "vocab": 67, **sections.pop("model", {})},
        train={**train, **sections.pop("train", {})},
        numerics=SHARDS,
        parallel=layout,
        **sections,
    )


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "recompute", "precision", "kv_heads"),
    [
        ({"tensor": 4}, "none", "fp32", 1),
        ({"tensor": 4}, "selective", "bf16", 4),
        ({"tensor": 2, "data": 2, "shard": "parameters"}, "full", "fp32", 1),
        ({"tensor": 2, "pipeline": 2, "schedule": "zb-h1"}, "none", "bf16", 4),
    ],
    ids=str,
)
def test_layouts_give_the_bits_of_one_process(
    undisturbed: Undisturbed,
    layout: dict[str, Any],
    recompute: str,
    precision: str,
    kv_heads: int,
) -> None:
    """With fewer key and value heads than shards, several shards have one in common."""
    model, train = {"kv_heads": kv_heads}, {"recompute": recompute}
    assert undisturbed.has_bits_of(run_of(layout, precision, model=model, train=train))


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ({"context": 2}, "fp32"),
        ({"tensor": 4, "context": 2, "context_exchange": "keys"}, "fp32"),
        ({"tensor": 2, "context": 2}, "bf16"),
    ],
    ids=str,
)
def test_slices_and_documents_divide_likewise(
    undisturbed: Undisturbed, layout: dict[str, Any], precision: str
) -> None:
    """With a loss by chunks of the vocabulary."""
    sections: dict[str, Any] = {
        "model": {"tie_embeddings": True, "layers": 1},
        "train": {"context_chunks": 4, "vocab_chunk": 9},
        "data": {"packing": "documents"},
    }
    assert undisturbed.has_bits_of(run_of(layout, precision, **sections))


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kv_heads"),
    [
        ({}, 1),
        ({"tensor": 2, "data": 2, "pipeline": 2}, 4),
        ({"tensor": 4, "context": 2}, 1),
        ({"tensor": 2, "context": 2}, 4),
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
def test_losses_in_tensor_groups_change_no_bit(cluster: Cluster, start: Starter) -> None:
    """One rank of each group but one is lost, and each time those that are left form groups."""
    sections: dict[str, Any] = {
        "train": {"steps": 5, "global_batch": 4, "seq_len": 32},
        "model": {"layers": 2, "kv_heads": 1},
        "numerics": SHARDS,
    }
    expected = bits_of(run_training(cluster, make_config(**sections)))
    chaos = [fault("kill", 1, 2, "backward"), fault("kill", 4, 3, "gather")]
    run = start(
        **sections,
        parallel={"tensor": 2, "data": 3},
        elastic={"respawn": False, "chaos": chaos},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert len(run.events("recovered")) == 2


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [{"kv_heads": 1}, {"family": "gpt2", "kv_heads": 0}], ids=["llama", "gpt2"]
)
def test_a_killed_run_resumes_with_another_tensor_degree(
    cluster: Cluster, tmp_path: Path, model: dict[str, Any]
) -> None:
    """A rank with several parts of a matrix saves them, by rows or columns, and loads them. Keys
    and values of GPT-2 have a head for each shard; those of Llama have one in all.
    """

    def train(layout: dict[str, Any], name: str, **more: Any) -> None:
        config = run_of(layout, model=model, train={"steps": 6}, checkpoint={"every": 2})
        run_in(cluster, config, tmp_path / name, **more)

    train({}, "whole")
    with pytest.raises(Exception, match=r"\S"):
        train({"data": 2, "shard": "parameters"}, "parts", kill=(1, 3))
    with pytest.raises(Exception, match=r"\S"):
        train({"tensor": 4}, "parts", kill=(1, 5))
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
