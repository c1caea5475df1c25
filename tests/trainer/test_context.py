"""Context parallelism: any number of ranks of a context group, with the bits of one process."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.trainer.config.rules import problems_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault
from support.runs.layouts import in_slices, tiny
from support.runs.small_runs import findings_of, make_config, run_training

STEPS = 2
"""The second begins with what the first has changed."""
LAYOUTS: list[dict[str, Any]] = [
    {"context": 2},
    {"context": 4},
    {"context": 2, "context_exchange": "keys"},
    {"context": 4, "context_exchange": "keys", "data": 2},
    {"context": 2, "data": 2, "pipeline": 2, "schedule": "zb-h1"},
    {"context": 2, "data": 2, "shard": "parameters"},
    {"context": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v", "shard": "gradients"},
]
"""Every other one with each precision: tests/trainer/test_layout_pairs.py has the pairs."""


def run_of(layout: dict[str, Any], precision: str = "fp32", **sections: Any) -> Any:
    train: dict[str, Any] = {"steps": STEPS, "global_batch": 4, "seq_len": 32, "context_chunks": 4}
    train["precision"] = precision
    return make_config(
        model={"layers": 4, **sections.pop("model", {})},
        train={**train, **sections.pop("train", {})},
        parallel=layout,
        **sections,
    )


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("precision", "packing"), [("fp32", "documents"), ("bf16", "concatenated")]
)
def test_layouts_give_the_bits_of_one_process(
    cluster: Cluster, precision: str, packing: str
) -> None:
    data = {"packing": packing}
    alone = run_training(cluster, run_of({}, precision, data=data))
    for layout in LAYOUTS[precision == "bf16" :: 2]:
        assert run_training(cluster, run_of(layout, precision, data=data)) == alone, layout


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "recompute"), [(1, "selective"), (4, "full")])
def test_heads_that_groups_share_and_recompute_keep_the_bits(
    cluster: Cluster, kv_heads: int, recompute: str
) -> None:
    """With one key and value head, ranks have copies of it."""
    keys: dict[str, Any] = {"model": {"kv_heads": kv_heads, "layers": 2}}
    alone = run_training(cluster, run_of({}, **keys))
    for layout in ({"context": 4}, {"context": 2, "context_exchange": "keys"}):
        config = run_of(layout, **keys, train={"recompute": recompute})
        assert run_training(cluster, config) == alone, layout


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "packing"),
    [
        ({"context": 2}, "documents"),
        ({"context": 2, "context_exchange": "keys", "data": 2}, "concatenated"),
        ({"context": 2, "tensor": 2}, "documents"),
        ({"context": 2, "tensor": 2, "sequence_parallel": False, "pipeline": 2}, "concatenated"),
        ({"context": 4, "context_exchange": "keys", "tensor": 2}, "documents"),
        ({"context": 2, "context_exchange": "ring", "tensor": 2, "pipeline": 2}, "documents"),
        ({"context": 4, "context_exchange": "ring", "data": 2}, "concatenated"),
    ],
    ids=str,
)
def test_layouts_equal_autograd_in_float64(
    cluster: Cluster, layout: dict[str, Any], packing: str
) -> None:
    config = in_slices(tiny(layout, {}), 4, packing)
    assert findings_of(cluster, config) == []


DISTURBED: dict[str, Any] = {
    "model": {"layers": 2},
    "train": {"steps": 5, "global_batch": 4, "seq_len": 32, "context_chunks": 4},
}


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(**DISTURBED)))


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["backward", "reduce", "gather"])
def test_a_loss_in_a_context_group_changes_no_bit(
    start: Starter, expected: dict[str, Any], phase: str
) -> None:
    run = start(
        **DISTURBED,
        parallel={"context": 2, "data": 2},
        elastic={"respawn": False, "chaos": [fault("kill", 2, 3, phase)]},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    (recovered,) = run.events("recovered")
    assert recovered["plan"]["stages"] == [[[0, 1], [3]]]


@pytest.mark.parametrize(
    ("train", "layout", "said"),
    [
        ({"context_chunks": 3, "seq_len": 48}, {"context": 2}, "does not divide train.context"),
        ({}, {"context": 2}, "set the latter to a multiple of it"),
        (
            {"context_chunks": 8, "seq_len": 32},
            {"context": 8, "context_exchange": "heads"},
            "does not divide model.heads = 4",
        ),
        ({"context_chunks": 16, "seq_len": 16}, {"context": 2}, "needs a multiple of 32"),
        (
            {"context_chunks": 4},
            {"context": 2, "context_exchange": "ring"},
            "numerics.reduction = 'exact' refuses",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    train: dict[str, Any], layout: dict[str, Any], said: str
) -> None:
    (problem,) = problems_of(make_config(train=train, parallel=layout))
    assert said in problem
