"""Sequences that pass the pipeline in stretches: the bits of one process, also through losses.

tests/trainer/test_layout_pairs.py has pairs of everything with two stretches; here are four.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.parallel.offload import estimate_offload
from holdfast.parallel.plan.cost import (
    between_stretches_bytes,
    peak_activation_bytes,
    replica_timeline,
)
from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config.rules import problems_of
from holdfast.trainer.step.planning import plan_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault, pace
from support.runs.layouts import in_slices, tiny
from support.runs.small_runs import findings_of, make_config, run_training
from support.runs.undisturbed import Undisturbed

INTERLEAVED = {"virtual": 2, "schedule": "interleaved-1f1b"}
FEW = {"context_chunks": 4, "seq_len": 32, "global_batch": 3}
"""Slices and micro-batches enough for runs of several processes."""


def run_of(layout: dict[str, Any], **sections: Any) -> Any:
    train = {"steps": 2, "global_batch": 4, "seq_len": 64, "context_chunks": 8, "eval_every": 2}
    return make_config(
        model={"layers": 4, "kv_heads": 2, **sections.pop("model", {})},
        train={**train, **sections.pop("train", {})},
        numerics={"tensor_shards": 2},
        parallel=layout,
        **sections,
    )


FOUR_CHUNKS = {"blocks_per_chunk": [0, 1, 1, 0]}


def few_of(layout: dict[str, Any], *, packing: str = "concatenated", **keys: Any) -> Any:
    """A run of processes: of two layers and three micro-batches."""
    offload = {"offload": keys.pop("offload")} if "offload" in keys else {}
    return make_config(
        model={"layers": 2, "kv_heads": 2},
        train={"steps": 2, **FEW, **keys},
        data={"packing": packing},
        parallel=layout,
        **offload,
    )


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What one process computes, each run once."""
    return Undisturbed(cluster)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "precision", "packing", "recompute"),
    [
        ({"stretches": 4}, "fp32", "documents", "full"),
        (
            {"stretches": 4, "pipeline": 2, "data": 2, **INTERLEAVED, **FOUR_CHUNKS},
            *("fp32", "documents", "full"),
        ),
        (
            {"stretches": 2, "pipeline": 2, "virtual": 2, "schedule": "gpipe", **FOUR_CHUNKS},
            *("bf16", "concatenated", "none"),
        ),
        ({"stretches": 4, "pipeline": 4, **FOUR_CHUNKS}, "bf16", "concatenated", "none"),
        (
            {"stretches": 2, "pipeline": 2, "context": 2, "context_exchange": "heads"},
            *("fp32", "documents", "full"),
        ),
    ],
    ids=str,
)
def test_stretches_give_the_bits_of_one_process(
    undisturbed: Undisturbed,
    layout: dict[str, Any],
    precision: str,
    packing: str,
    recompute: str,
) -> None:
    config = few_of(layout, precision=precision, recompute=recompute, packing=packing)
    assert undisturbed.has_bits_of(config)


@pytest.mark.mp
@pytest.mark.slow
def test_activations_of_stretches_are_offloaded(cluster: Cluster) -> None:
    alone = run_training(cluster, few_of({}, recompute="selective"))
    layout = {"stretches": 4, "pipeline": 2}
    config = few_of(layout, recompute="selective", offload={"activations": "ssd"})
    assert run_training(cluster, config) == alone


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "recompute"), [("concatenated", "full"), ("documents", "none")]
)
def test_stretches_equal_autograd_in_float64(
    cluster: Cluster, packing: str, recompute: str
) -> None:
    layout = {"stretches": 2, "pipeline": 2, **INTERLEAVED}
    config = in_slices(tiny(layout, {}), 4, packing)
    train = msgspec.structs.replace(config.train, recompute=recompute)
    assert findings_of(cluster, msgspec.structs.replace(config, train=train)) == []


DISTURBED: dict[str, Any] = {
    "model": {"layers": 2, "kv_heads": 2},
    "train": {**FEW, "steps": 5, "global_batch": 4},
    "numerics": {"tensor_shards": 2},
}


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(**DISTURBED)))


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "layout",
    [
        {
            **{"pipeline": 2, "data": 2, "stretches": 4, "blocks_per_chunk": [0, 1, 1, 0]},
            **INTERLEAVED,
        },
        {"tensor": 2, "data": 2, "stretches": 4},
        {"context": 2, "data": 2, "stretches": 2},
    ],
    ids=str,
)
def test_losses_amid_stretches_change_no_bit(
    start: Starter, expected: dict[str, Any], layout: dict[str, Any]
) -> None:
    run = start(
        **DISTURBED,
        parallel=layout,
        elastic=pace(
            {"chaos": [fault("kill", 1, 2, "backward"), fault("kill", 2, 4, "backward")]}, 0.2
        ),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))
    assert len(run.events("recovered")) >= 2


@pytest.mark.parametrize(("layout", "under_way"), [({}, 3), (INTERLEAVED, 2)], ids=str)
def test_a_plan_tells_of_the_smaller_bubble_and_memory(
    layout: dict[str, Any], under_way: int
) -> None:
    """Where one sequence ends backwards, 1F1B is at the begin of the one after the next."""
    whole, parts = (
        plan_of(run_of({"pipeline": 4, "stretches": count, **layout}, model={"layers": 8}))
        for count in (1, 8)
    )
    assert replica_timeline(parts).bubble < replica_timeline(whole).bubble / 5
    # The work is the same, though later stretches have more of it.
    busy = [replica_timeline(plan).busy for plan in (whole, parts)]
    assert busy[1] == pytest.approx(busy[0])
    assert peak_activation_bytes(parts, 0) < peak_activation_bytes(whole, 0) / 2
    # Of two layers of hidden 32 and sequences of 64 tokens: keys, values, and sums of both.
    assert between_stretches_bytes(whole, 0) == 0
    assert between_stretches_bytes(parts, 0) == 2 * under_way * (2 * 64 * 32 * (4 + 4))


def test_an_estimate_of_offload_counts_stretches_as_parts() -> None:
    sent = [
        estimate_offload(
            plan_of(run_of({"pipeline": 2, "schedule": "gpipe", "stretches": count})),
            0,
            most_share=1.0,
            flops_per_s=1e12,
            drive_bytes_per_s=0.0,
        )
        for count in (1, 8)
    ]
    assert sent[1].written_bytes == sent[0].written_bytes
    assert sent[1].needed_bytes_per_s == pytest.approx(sent[0].needed_bytes_per_s)


@pytest.mark.parametrize(
    "layout",
    [
        {"stretches": 2, "pipeline": 2},
        {"stretches": 2, "context": 4},
        {"stretches": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunks", [8, 16])
@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_check_of_slices_is_a_legal_run(
    layout: dict[str, Any], chunks: int, reduction: str
) -> None:
    config = make_config(
        model={"layers": 4, "heads": 8, "kv_heads": 8, "hidden": 64},
        train={"seq_len": 512, "context_chunks": chunks},
        numerics={"tensor_strips": 4, "reduction": reduction},
        parallel=layout,
    )
    assert list(problems_of(config)) == []
    assert list(problems_of(tiny_config(config, 2))) == []


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"stretches": 3}, "does not divide train.context_chunks = 8"),
        ({"stretches": 8, "context": 2}, "does not divide train.context_chunks = 8"),
        ({"stretches": 2, "pipeline": 2, "schedule": "zb-h1"}, "takes sequences as a whole"),
        ({"stretches": 2, "context": 2, "context_exchange": "keys"}, "must exchange heads"),
        ({"stretches": 2, "data": 2, "shard": "gradients"}, "travel by whole micro-batches"),
    ],
)
def test_what_does_not_go_with_stretches_is_refused(layout: dict[str, Any], said: str) -> None:
    (problem,) = problems_of(run_of(layout))
    assert said in problem
