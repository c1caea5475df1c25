"""Layers that are computed in strips of their tokens: beside communication, or all by one rank."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.trainer.config.rules import problems_of
from support.processes.cluster import Cluster
from support.runs.layouts import tiny
from support.runs.small_runs import findings_of, make_config, run_training


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "layers", "layouts"),
    [
        ("fp32", 1, [(2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 3)]),
        ("bf16", 2, [(2, 4), (4, 3)]),
    ],
    ids=["fp32", "bf16"],
)
def test_ranks_and_one_process_compute_strips_with_the_same_bits(
    cluster: Cluster, precision: str, layers: int, layouts: list[tuple[int, int]]
) -> None:
    """However many travel together: 8 messages of a rank to 1. Layer after layer, and in every
    micro-batch, they travel alike: two of each are enough, with one number of messages.
    """

    def trained(tensor: int, per_message: int) -> dict[str, Any]:
        config = make_config(
            model={"layers": layers},
            train={"steps": 2, "seq_len": 64, "global_batch": layers, "precision": precision},
            numerics={"tensor_shards": 4, "tensor_strips": 16},
            parallel={"tensor": tensor, "strips_per_message": per_message},
        )
        return run_training(cluster, config)

    alone = trained(1, 1)
    for tensor, per_message in layouts:
        assert trained(tensor, per_message) == alone, (tensor, per_message)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"tensor": 4, "pipeline": 2}], ids=str)
@pytest.mark.parametrize("shards", [1, 4])
def test_strips_equal_autograd_in_float64(
    cluster: Cluster, layout: dict[str, Any], shards: int
) -> None:
    config = tiny(layout, {})
    numerics = {"tensor_shards": shards, "tensor_strips": 8}
    config = msgspec.structs.replace(
        config, numerics=msgspec.structs.replace(config.numerics, **numerics)
    )
    assert findings_of(cluster, config) == []


@pytest.mark.parametrize(
    ("strips", "layout", "said"),
    [
        (3, {"tensor": 2}, "is no multiple of parallel.tensor = 2"),
        (32, {}, "a slice has 16 tokens"),
        (2, {"sequence_parallel": False}, "needs parallel.sequence_parallel = true"),
    ],
)
def test_what_does_not_fit_is_refused(strips: int, layout: dict[str, Any], said: str) -> None:
    problems = problems_of(make_config(numerics={"tensor_strips": strips}, parallel=layout))
    assert any(said in problem for problem in problems), problems
