"""Context parallelism: any number of ranks of a context group, with the bits of one process.

tests/trainer/test_layout_pairs.py has every pair of a context group, in powers of two.
"""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.trainer.config.rules import problems_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault
from support.runs.layouts import in_slices, tiny
from support.runs.small_runs import findings_of, make_config, run_training
from support.runs.undisturbed import Undisturbed

STEPS = 2
"""The second begins with what the first has changed."""


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What one process computes, each run once."""
    return Undisturbed(cluster)


def run_of(layout: dict[str, Any], precision: str = "fp32", **sections: Any) -> Any:
    train: dict[str, Any] = {"steps": STEPS, "global_batch": 3, "seq_len": 32, "context_chunks": 4}
    train["precision"] = precision
    return make_config(
        model={"layers": 2, **sections.pop("model", {})},
        train={**train, **sections.pop("train", {})},
        parallel=layout,
        **sections,
    )


COPIES: tuple[Any, ...] = ("fp32", "documents", 1, "selective")
"""With one key and value head, ranks have copies of it."""
OWN: tuple[Any, ...] = ("bf16", "concatenated", 4, "full")


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "precision", "packing", "kv_heads", "recompute"),
    [
        ({"context": 4}, *COPIES),
        ({"context": 2, "context_exchange": "keys", "data": 3}, *COPIES),
        ({"context": 2, "pipeline": 2, "schedule": "zb-h1"}, *COPIES),
        ({"context": 4}, *OWN),
        ({"context": 2, "context_exchange": "keys"}, *OWN),
        ({"context": 2, "data": 2, "shard": "parameters"}, *OWN),
        (
            {
                **{"context": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v"},
                **{"blocks_per_chunk": [0, 1, 1, 0], "shard": "gradients"},
            },
            *OWN,
        ),
    ],
    ids=str,
)
def test_layouts_give_the_bits_of_one_process(
    undisturbed: Undisturbed,
    layout: dict[str, Any],
    precision: str,
    packing: str,
    kv_heads: int,
    recompute: str,
) -> None:
    """Heads that groups share or have alone, and recomputing, keep the bits, too."""
    keys: dict[str, Any] = {"model": {"kv_heads": kv_heads}, "data": {"packing": packing}}
    config = run_of(layout, precision, train={"recompute": recompute}, **keys)
    assert undisturbed.has_bits_of(config)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "packing"),
    [
        ({"context": 2, "context_exchange": "keys", "data": 2}, "concatenated"),
        ({"context": 2, "tensor": 2}, "documents"),
        ({"context": 2, "tensor": 2, "sequence_parallel": False}, "concatenated"),
        ({"context": 2, "context_exchange": "keys", "tensor": 2}, "documents"),
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
    "train": {"steps": 4, "global_batch": 4, "seq_len": 32, "context_chunks": 4},
}


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.slow
def test_losses_in_context_groups_change_no_bit(cluster: Cluster, start: Starter) -> None:
    """One rank of each group is lost in turn, each in another phase of a step; the other one waits,
    has all slices alone, or is in a new group.
    """
    chaos = [
        fault("kill", 1, 1, "backward"),
        fault("kill", 2, 2, "reduce"),
        fault("kill", 4, 3, "gather"),
    ]
    run = start(
        **DISTURBED,
        parallel={"context": 2, "data": 3},
        elastic={"respawn": False, "chaos": chaos},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == bits_of(run_training(cluster, make_config(**DISTURBED)))
    plans = [event["plan"]["stages"] for event in run.events("recovered")]
    assert plans == [[[[2, 3], [4, 5]]], [[[0], [3], [4, 5]]], [[[0], [3, 5]]]]


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
