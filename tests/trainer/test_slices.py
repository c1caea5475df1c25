"""Sequences in slices: one number of slices has the same bits in every layout, and is right.

tests/trainer/test_layout_pairs.py has every pair of slices and an axis, in powers of two.
"""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config.rules import problems_of
from support.processes.cluster import Cluster
from support.runs.layouts import in_slices, tiny
from support.runs.small_runs import findings_of, make_config, run_training
from support.runs.undisturbed import Undisturbed

pytestmark = [pytest.mark.mp, pytest.mark.slow]

STEPS = 2
"""The second begins with what the first has changed."""


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What one process computes, each run once."""
    return Undisturbed(cluster)


def run_of(layout: dict[str, Any], slices: int, precision: str, **sections: Any) -> Any:
    train = {"steps": STEPS, "seq_len": 32, "global_batch": 4, "context_chunks": slices}
    return make_config(
        model={"layers": 2, **sections.pop("model", {})},
        train={**train, "precision": precision, **sections.pop("train", {})},
        parallel=layout,
        **sections,
    )


@pytest.mark.parametrize(
    ("precision", "packing", "layout"),
    [
        ("fp32", "documents", {"data": 3, "shard": "parameters"}),
        ("fp32", "documents", {"data": 2, "pipeline": 2, "schedule": "zb-h1"}),
        (
            *("bf16", "concatenated"),
            {
                **{"data": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v"},
                **{"blocks_per_chunk": [0, 1, 1, 0], "shard": "gradients"},
            },
        ),
        ("bf16", "concatenated", {"data": 3}),
    ],
    ids=str,
)
def test_layouts_give_the_same_bits(
    undisturbed: Undisturbed, precision: str, packing: str, layout: dict[str, Any]
) -> None:
    assert undisturbed.has_bits_of(run_of(layout, 4, precision, data={"packing": packing}))


@pytest.mark.parametrize("chunk", [0, 20])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_and_chunks_of_the_vocabulary_keep_the_bits(
    undisturbed: Undisturbed, chunk: int, recompute: str
) -> None:
    train = {"vocab_chunk": chunk, "recompute": recompute}
    assert undisturbed.has_bits_of(run_of({}, 4, "fp32", train=train))


def test_the_number_of_slices_changes_results_by_rounding_only(cluster: Cluster) -> None:
    whole, cut = (run_training(cluster, run_of({}, slices, "fp32")) for slices in (1, 8))
    assert whole["losses"] != cut["losses"]
    for first, second in zip(whole["losses"], cut["losses"], strict=True):
        assert float.fromhex(first) == pytest.approx(float.fromhex(second), rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "packing"),
    [
        ({}, "concatenated"),
        ({}, "documents"),
        ({"tensor": 2}, "documents"),
        ({"tensor": 2, "sequence_parallel": False}, "concatenated"),
        ({"pipeline": 2, "data": 2, "schedule": "zb-h1"}, "documents"),
    ],
    ids=str,
)
def test_layouts_equal_autograd_on_whole_sequences(
    cluster: Cluster, layout: dict[str, Any], packing: str
) -> None:
    config = in_slices(tiny(layout, {}), 4, packing)
    assert findings_of(cluster, config) == []


def test_the_tiny_form_of_a_run_keeps_its_slices() -> None:
    config = run_of({"tensor": 2}, 8, "fp32", model={"layers": 4, "heads": 4})
    small = tiny_config(config, 3)
    assert small.train.context_chunks == 8
    assert small.train.seq_len % 16 == 0


@pytest.mark.parametrize(
    ("train", "layout", "said"),
    [
        ({"seq_len": 30, "context_chunks": 4}, {}, "does not divide train.seq_len = 30"),
        ({"seq_len": 48, "context_chunks": 8}, {"tensor": 4}, "a slice has 6 tokens"),
    ],
)
def test_slices_that_do_not_fit_are_refused(
    train: dict[str, Any], layout: dict[str, Any], said: str
) -> None:
    config = make_config(model={"hidden": 64}, train=train, parallel=layout)
    (problem,) = problems_of(config)
    assert said in problem
