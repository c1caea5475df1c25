"""The first promise: losses, norms and parameters are the same bits in any layout, after each of
12 steps in the largest layouts and of 2 in the others.

Of tensor and context groups, and of what is recomputed in any layout, tests/trainer/
test_layout_pairs.py tries every pair; here are three stages and replicas, and the rest.
"""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.trainer.config import RunConfig
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, run_training
from support.runs.undisturbed import Undisturbed

pytestmark = [pytest.mark.mp, pytest.mark.slow]

STEPS = 2
MANY_STEPS = 12
MICRO_BATCHES = 7
"""No number of replicas has an even share of them."""


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What one process computes, each run once."""
    return Undisturbed(cluster)


def run_of(
    layout: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> RunConfig:
    """A run of two layers and five micro-batches: where their number does not matter."""
    return make_config(
        model={"layers": 2, **(model or {})},
        train={"steps": STEPS, "global_batch": 5, **(train or {})},
        parallel=layout,
        **sections,
    )


SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "1f1b"},
    {"schedule": "gpipe"},
    {"schedule": "gpipe", "virtual": 2},
    {"schedule": "interleaved-1f1b", "virtual": 2},
    {"schedule": "zb-h1"},
    {"schedule": "zb-v", "virtual": 2},
]


LONGEST: list[dict[str, Any]] = [
    {"data": 3, "pipeline": 3, "schedule": "1f1b"},
    {"data": 3, "pipeline": 3, "schedule": "zb-v", "virtual": 2},
]
"""What rounds only once weights have moved far shows in these."""


def layouts() -> list[dict[str, Any]]:
    """The longest, and every pair of data 1 to 3, pipeline 1 to 3, and schedule with 1 or 2 chunks
    per rank.
    """
    found = list(LONGEST)
    for data in (1, 2, 3):
        for number, schedule in enumerate(SCHEDULES):
            pipeline = 1 + (data + number + number // 3) % 3
            layout: dict[str, Any] = {"data": data, "pipeline": pipeline, **schedule}
            if pipeline == 2 and schedule.get("virtual") == 2:
                layout["blocks_per_chunk"] = [2, 1, 1, 2]
            if layout not in found:
                found.append(layout)
    return found


def test_the_layouts_have_every_pair() -> None:
    keys = [(v["data"], v["pipeline"], (v["schedule"], "virtual" in v)) for v in layouts()]
    pairs = [{(key[a], key[b]) for key in keys} for a, b in ((0, 1), (0, 2), (1, 2))]
    assert [len(seen) for seen in pairs] == [3 * 3, 3 * 6, 3 * 6]


@pytest.mark.parametrize("layout", layouts(), ids=lambda v: "-".join(map(str, v.values())))
def test_layout_gives_the_same_bits(undisturbed: Undisturbed, layout: dict[str, Any]) -> None:
    steps = MANY_STEPS if layout in LONGEST else STEPS
    train = {"steps": steps, "global_batch": MICRO_BATCHES}
    assert undisturbed.has_bits_of(make_config(parallel=layout, train=train))


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        ({"data": 2}, "descending"),
        ({"data": 2}, "shuffled"),
        ({"data": 3, "pipeline": 2}, "descending"),
        ({"data": 3, "pipeline": 2}, "shuffled"),
        ({"data": 3, "tensor": 2}, "shuffled"),
    ],
    ids=str,
)
def test_order_of_micro_batches_gives_the_same_bits(
    undisturbed: Undisturbed, layout: dict[str, Any], order: str
) -> None:
    assert undisturbed.has_bits_of(run_of({**layout, "micro_batch_order": order}))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", [{}, {"pipeline": 2, "data": 2, "schedule": "zb-h1"}], ids=str)
def test_recompute_gives_the_same_bits(
    undisturbed: Undisturbed, recompute: str, layout: dict[str, Any]
) -> None:
    assert undisturbed.has_bits_of(run_of(layout, train={"recompute": recompute}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 3, "blocks_per_chunk": [0, 2, 2]},
        {
            **{"pipeline": 2, "data": 2, "schedule": "interleaved-1f1b", "virtual": 3},
            "blocks_per_chunk": [0, 1, 1, 1, 1, 0],
        },
        {
            **{"pipeline": 3, "data": 2, "schedule": "zb-v", "virtual": 2},
            "blocks_per_chunk": [0, 1, 1, 1, 1, 0],
        },
    ],
    ids=["1f1b", "interleaved-1f1b", "zb-v"],
)
def test_tied_embeddings_give_the_same_bits(
    undisturbed: Undisturbed, precision: str, layout: dict[str, Any]
) -> None:
    model = {"layers": 4, "tie_embeddings": True}
    assert undisturbed.has_bits_of(run_of(layout, model=model, train={"precision": precision}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_by_chunks_of_the_vocabulary_gives_the_same_bits(
    cluster: Cluster, precision: str
) -> None:
    def run(chunk: int, **layout: Any) -> dict[str, Any]:
        train = {"precision": precision, "global_batch": 4, "vocab_chunk": chunk}
        return run_training(cluster, run_of(layout, train=train))

    alone = run(16)
    assert run(16, data=2) == alone
    assert run(16, pipeline=2) == alone
    assert run(16, pipeline=2, data=2, schedule="zb-h1") == alone
    whole = run(67)
    assert whole == run(0)
    assert alone["digest"] != whole["digest"]  # the key is one that fixes the bits
    for loss, same in zip(alone["losses"], whole["losses"], strict=True):
        assert float.fromhex(loss) == pytest.approx(
            float.fromhex(same), rel=1e-5 if precision == "fp32" else 1e-2
        )


def test_chunks_within_a_tensor_group_give_the_same_bits(cluster: Cluster) -> None:
    def run(chunk: int, **layout: Any) -> dict[str, Any]:
        config = run_of(
            {"tensor": 2, **layout},
            model={"layers": 1, "tie_embeddings": True},
            train={"global_batch": 2, "vocab_chunk": chunk},
        )
        return run_training(cluster, config)

    alone = run(8)
    assert run(8, pipeline=2, schedule="zb-h1", blocks_per_chunk=[1, 0]) == alone
    assert run(8, data=2) == alone
    assert run(34) == run(0)  # the larger of the two parts


EXCHANGES: dict[str, dict[str, Any]] = {
    "at the end": {"overlap": False},
    "unpacked": {"packing": False},
    "in small messages": {"bucket_elements": 1},
    "at the end, unpacked, in small messages": {
        "overlap": False,
        "packing": False,
        "bucket_elements": 500,
    },
}

REPLICAS: list[dict[str, Any]] = [
    {"data": 4},
    {
        **{"data": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v"},
        "blocks_per_chunk": [0, 1, 1, 0],
    },
]


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=list(EXCHANGES))
@pytest.mark.parametrize("layout", REPLICAS, ids=["alone", "stages"])
def test_how_gradients_travel_changes_no_bit(
    undisturbed: Undisturbed, layout: dict[str, Any], exchange: dict[str, Any]
) -> None:
    assert undisturbed.has_bits_of(run_of({**layout, **exchange}))


def test_in_fast_mode_the_exchange_changes_no_bit_but_by_rounding(cluster: Cluster) -> None:
    def run(**exchange: Any) -> dict[str, Any]:
        layout = {"data": 3, "bucket_elements": 500, **exchange}
        return run_training(cluster, run_of(layout, numerics={"reduction": "fast"}))

    beside, rounded = run(), run(reduce_dtype="bf16")
    assert run(overlap=False) == beside
    assert rounded != beside
    [first, *_], [first_rounded, *_] = beside["norms"], rounded["norms"]
    assert float.fromhex(first_rounded) == pytest.approx(float.fromhex(first), rel=2**-8)
    for one, other in zip(beside["losses"], rounded["losses"], strict=True):
        assert float.fromhex(other) == pytest.approx(float.fromhex(one), rel=2**-8)


@pytest.fixture(scope="module")
def whole_losses(cluster: Cluster) -> list[str]:
    return run_training(cluster, run_of({}, train=TENSOR_RUN))["losses"]


TENSOR_RUN = {"steps": 4, "global_batch": 4, "micro_batch": 4}
"""Steps that begin with what others have changed, each by one pass."""


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_sizes_agree_within_rounding(
    cluster: Cluster, whole_losses: list[str], tensor: int, sequence_parallel: bool
) -> None:
    layout = {"tensor": tensor, "sequence_parallel": sequence_parallel}
    losses = run_training(cluster, run_of(layout, train=TENSOR_RUN))["losses"]
    for split, whole in zip(losses, whole_losses, strict=True):
        assert float.fromhex(split) == pytest.approx(float.fromhex(whole), rel=1e-5)


def test_a_training_that_has_ended_leaves_no_thread_of_its_connections(cluster: Cluster) -> None:
    counts = []
    for _ in range(3):
        run_training(cluster, run_of({"data": 4}, train={"steps": 1}))
        counts.append(max(cluster.run("support.runs.small_runs:threads_here", 4)))
    assert counts[-1] < counts[0] + 3, "each training has a connection to each of three peers"


def test_another_seed_gives_other_bits(cluster: Cluster) -> None:
    first, other = (run_training(cluster, run_of({}, train={"seed": seed})) for seed in (1, 7))
    assert other["digest"] != first["digest"]


def test_the_digest_sees_one_bit(cluster: Cluster) -> None:
    first, second = (
        run_training(cluster, run_of({}, train={"steps": 1}, optimizer={"eps": eps}))
        for eps in (1e-8, 1.0000001e-8)
    )
    assert first["losses"] == second["losses"]
    assert first["digest"] != second["digest"]


SHARDS: dict[str, dict[str, Any]] = {
    f"{shard}-{group}": {"shard": shard, "shard_group": group}
    for shard in ("gradients", "parameters")
    for group in (0, 2)
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=list(SHARDS))
@pytest.mark.parametrize("layout", REPLICAS, ids=["alone", "stages"])
def test_what_replicas_share_changes_no_bit(
    undisturbed: Undisturbed, layout: dict[str, Any], shard: dict[str, Any]
) -> None:
    assert undisturbed.has_bits_of(run_of({**layout, **shard}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_on_the_host_gives_the_same_bits(cluster: Cluster, precision: str) -> None:
    """On a CPU: a GPU's own kernels may round otherwise than those of the host."""

    def run(state: str, **layout: Any) -> dict[str, Any]:
        config = run_of(
            layout,
            model={"tie_embeddings": True},
            train={"steps": 3, "global_batch": 3, "precision": precision},
            optimizer={"state": state},
        )
        return run_training(cluster, config)

    alone = run("device")
    assert run("host") == alone
    assert run("host", data=2, bucket_elements=500) == alone
    assert run("host", data=2, pipeline=2, shard="parameters") == alone


@pytest.mark.parametrize("shard", ["gradients", "parameters"])
@pytest.mark.parametrize(
    ("train", "layout"),
    [
        ({"precision": "bf16", "recompute": "full"}, {"data": 4}),
        ({"precision": "bf16", "recompute": "full"}, {"data": 2, "pipeline": 2}),
        ({"precision": "bf16", "recompute": "full"}, {"data": 2, "shard_group": 1}),
        ({"global_batch": 2}, {"data": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_what_replicas_share_changes_no_bit_of_other_models(
    undisturbed: Undisturbed, shard: str, train: dict[str, Any], layout: dict[str, Any]
) -> None:
    """Tied weights in one stage and over stages, bf16, and norms that tensor ranks share."""
    config = run_of({**layout, "shard": shard}, model={"tie_embeddings": True}, train=train)
    assert undisturbed.has_bits_of(config)
