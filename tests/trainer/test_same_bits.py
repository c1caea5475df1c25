"""The first promise: losses, norms and parameters are the same bits in any layout, after each of
12 steps in the largest layouts and of 2 in the others.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp, pytest.mark.slow]

STEPS = 2
MANY_STEPS = 12


@pytest.fixture(scope="module")
def one_process(cluster: Cluster) -> dict[int, dict[str, Any]]:
    """What one process computes, by the number of steps."""
    return {
        steps: run_training(cluster, make_config(train={"steps": steps}))
        for steps in (STEPS, MANY_STEPS)
    }


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
    """The longest, and every pair of data 1 to 4, pipeline 1 to 3, and schedule with 1 or 2 chunks
    per rank.
    """
    found = list(LONGEST)
    for data in (1, 2, 3, 4):
        for number, schedule in enumerate(SCHEDULES):
            pipeline = 1 + (data + number) % 3
            layout: dict[str, Any] = {"data": data, "pipeline": pipeline, **schedule}
            if pipeline == 2 and schedule.get("virtual") == 2:
                layout["blocks_per_chunk"] = [2, 1, 1, 2]
            if layout not in found:
                found.append(layout)
    return found


def test_the_layouts_have_every_pair() -> None:
    keys = [(v["data"], v["pipeline"], (v["schedule"], "virtual" in v)) for v in layouts()]
    pairs = [{(key[a], key[b]) for key in keys} for a, b in ((0, 1), (0, 2), (1, 2))]
    assert [len(seen) for seen in pairs] == [4 * 3, 4 * 6, 3 * 6]


@pytest.mark.parametrize("layout", layouts(), ids=lambda v: "-".join(map(str, v.values())))
def test_layout_gives_the_same_bits(
    cluster: Cluster, one_process: dict[int, dict[str, Any]], layout: dict[str, Any]
) -> None:
    steps = MANY_STEPS if layout in LONGEST else STEPS
    config = make_config(parallel=layout, train={"steps": steps})
    assert run_training(cluster, config) == one_process[steps]


@pytest.mark.parametrize("order", ["descending", "shuffled"])
@pytest.mark.parametrize("layout", [{"data": 2}, {"data": 3, "pipeline": 2}], ids=str)
def test_order_of_micro_batches_gives_the_same_bits(
    cluster: Cluster, one_process: dict[int, dict[str, Any]], layout: dict[str, Any], order: str
) -> None:
    config = make_config(parallel={**layout, "micro_batch_order": order}, train={"steps": STEPS})
    assert run_training(cluster, config) == one_process[STEPS]


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", [{}, {"pipeline": 2, "data": 2, "schedule": "zb-h1"}], ids=str)
def test_recompute_gives_the_same_bits(
    cluster: Cluster,
    one_process: dict[int, dict[str, Any]],
    recompute: str,
    layout: dict[str, Any],
) -> None:
    config = make_config(parallel=layout, train={"recompute": recompute, "steps": STEPS})
    assert run_training(cluster, config) == one_process[STEPS]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tied_embeddings_give_the_same_bits(cluster: Cluster, precision: str) -> None:
    def run(**layout: Any) -> dict[str, Any]:
        config = make_config(
            model={"tie_embeddings": True},
            train={"precision": precision, "steps": STEPS},
            parallel=layout,
        )
        return run_training(cluster, config)

    alone = run()
    assert run(pipeline=3) == alone
    assert run(pipeline=2, data=2, schedule="interleaved-1f1b", virtual=3) == alone
    assert run(pipeline=3, data=2, schedule="zb-v", virtual=2) == alone


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_by_chunks_of_the_vocabulary_gives_the_same_bits(
    cluster: Cluster, precision: str
) -> None:
    def run(chunk: int, **layout: Any) -> dict[str, Any]:
        config = make_config(
            model={"layers": 2},
            train={"precision": precision, "steps": 2, "global_batch": 4, "vocab_chunk": chunk},
            parallel=layout,
        )
        return run_training(cluster, config)

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
        config = make_config(
            model={"layers": 2, "tie_embeddings": True},
            train={"steps": 2, "global_batch": 4, "vocab_chunk": chunk},
            parallel={"tensor": 2, **layout},
        )
        return run_training(cluster, config)

    alone = run(8)
    assert run(8, pipeline=2, schedule="zb-h1") == alone
    assert run(8, data=2) == alone
    assert run(34) == run(0)  # the larger of the two parts


def test_bf16_gives_the_same_bits(cluster: Cluster) -> None:
    alone = run_training(cluster, make_config(train={"precision": "bf16", "steps": STEPS}))
    layout = {"pipeline": 3, "data": 2, "schedule": "zb-h1"}
    config = make_config(train={"precision": "bf16", "steps": STEPS}, parallel=layout)
    assert run_training(cluster, config) == alone


def test_tensor_parallel_layouts_give_the_same_bits_among_themselves(cluster: Cluster) -> None:
    def run(**layout: Any) -> dict[str, Any]:
        config = make_config(
            model={"layers": 2},
            train={"steps": STEPS, "global_batch": 6},
            parallel={"tensor": 2, **layout},
        )
        return run_training(cluster, config)

    alone = run()
    assert run(pipeline=2, data=2, schedule="zb-h1") == alone
    assert run(data=3, micro_batch_order="shuffled") == alone


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


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=list(EXCHANGES))
@pytest.mark.parametrize(
    "layout", [{"data": 4}, {"data": 2, "pipeline": 3, "virtual": 2, "schedule": "zb-v"}], ids=str
)
def test_how_gradients_travel_changes_no_bit(
    cluster: Cluster,
    one_process: dict[int, dict[str, Any]],
    layout: dict[str, Any],
    exchange: dict[str, Any],
) -> None:
    config = make_config(parallel={**layout, **exchange}, train={"steps": STEPS})
    assert run_training(cluster, config) == one_process[STEPS]


def test_in_fast_mode_the_exchange_changes_no_bit_but_by_rounding(cluster: Cluster) -> None:
    def run(**exchange: Any) -> dict[str, Any]:
        parallel = {"data": 3, "bucket_elements": 500, **exchange}
        fast = {"numerics": {"reduction": "fast"}, "train": {"steps": STEPS}}
        return run_training(cluster, make_config(parallel=parallel, **fast))

    beside, rounded = run(), run(reduce_dtype="bf16")
    assert run(overlap=False) == beside
    assert rounded != beside
    [first, *_], [first_rounded, *_] = beside["norms"], rounded["norms"]
    assert float.fromhex(first_rounded) == pytest.approx(float.fromhex(first), rel=2**-8)
    for one, other in zip(beside["losses"], rounded["losses"], strict=True):
        assert float.fromhex(other) == pytest.approx(float.fromhex(one), rel=2**-8)


@pytest.fixture(scope="module")
def whole_losses(cluster: Cluster) -> list[str]:
    return run_training(cluster, make_config(**TENSOR_RUN))["losses"]


TENSOR_RUN: dict[str, Any] = {
    "model": {"layers": 2},
    "train": {"steps": 4, "global_batch": 8, "micro_batch": 4},
}


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_sizes_agree_within_rounding(
    cluster: Cluster, whole_losses: list[str], tensor: int, sequence_parallel: bool
) -> None:
    layout = {"tensor": tensor, "sequence_parallel": sequence_parallel}
    losses = run_training(cluster, make_config(**TENSOR_RUN, parallel=layout))["losses"]
    for split, whole in zip(losses, whole_losses, strict=True):
        assert float.fromhex(split) == pytest.approx(float.fromhex(whole), rel=1e-5)


def test_a_training_that_has_ended_leaves_no_thread_of_its_connections(cluster: Cluster) -> None:
    counts = []
    for _ in range(3):
        run_training(cluster, make_config(parallel={"data": 4}, train={"steps": 1}))
        counts.append(max(cluster.run("support.runs.small_runs:threads_here", 4)))
    assert counts[-1] < counts[0] + 3, "each training has a connection to each of three peers"


def test_another_seed_gives_other_bits(
    cluster: Cluster, one_process: dict[int, dict[str, Any]]
) -> None:
    other = run_training(cluster, make_config(train={"seed": 7, "steps": STEPS}))
    assert other["digest"] != one_process[STEPS]["digest"]


def test_the_digest_sees_one_bit(cluster: Cluster) -> None:
    steps = {"steps": 1}
    first = run_training(cluster, make_config(train=steps, optimizer={"eps": 1e-8}))
    second = run_training(cluster, make_config(train=steps, optimizer={"eps": 1.0000001e-8}))
    assert first["losses"] == second["losses"]
    assert first["digest"] != second["digest"]


SHARDS: dict[str, dict[str, Any]] = {
    f"{shard}-{group}": {"shard": shard, "shard_group": group}
    for shard in ("gradients", "parameters")
    for group in (0, 2)
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=list(SHARDS))
@pytest.mark.parametrize(
    "layout", [{"data": 4}, {"data": 2, "pipeline": 3, "virtual": 2, "schedule": "zb-v"}], ids=str
)
def test_what_replicas_share_changes_no_bit(
    cluster: Cluster,
    one_process: dict[int, dict[str, Any]],
    layout: dict[str, Any],
    shard: dict[str, Any],
) -> None:
    config = make_config(parallel={**layout, **shard}, train={"steps": STEPS})
    assert run_training(cluster, config) == one_process[STEPS]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_on_the_host_gives_the_same_bits(cluster: Cluster, precision: str) -> None:
    """On a CPU: a GPU's own kernels may round otherwise than those of the host."""

    def run(state: str, **layout: Any) -> dict[str, Any]:
        config = make_config(
            model={"layers": 2, "tie_embeddings": True},
            train={"steps": 3, "global_batch": 4, "precision": precision},
            optimizer={"state": state},
            parallel=layout,
        )
        return run_training(cluster, config)

    alone = run("device")
    assert run("host") == alone
    assert run("host", data=2, bucket_elements=500) == alone
    assert run("host", data=2, pipeline=2, shard="parameters") == alone


@pytest.mark.parametrize("shard", ["gradients", "parameters"])
def test_what_replicas_share_changes_no_bit_of_other_models(cluster: Cluster, shard: str) -> None:
    """Tied weights in one stage and over stages, bf16, and norms that tensor ranks share."""

    def run(tensor: int, train: dict[str, Any], **layout: Any) -> dict[str, Any]:
        config = make_config(
            model={"layers": 2, "tie_embeddings": True},
            train={"steps": 2, "global_batch": 4, "eval_every": 1, "eval_batches": 1, **train},
            data={"eval_fraction": 0.5},
            parallel={"tensor": tensor, **layout},
        )
        return run_training(cluster, config)

    rounded = {"precision": "bf16", "recompute": "full"}
    alone = run(1, rounded)
    assert run(1, rounded, data=4, shard=shard) == alone
    assert run(1, rounded, data=2, pipeline=2, shard=shard) == alone
    assert run(1, rounded, data=2, shard=shard, shard_group=1) == alone
    alone = run(2, {})
    assert run(2, {}, data=2, shard=shard) == alone
    selective = {"recompute": "selective"}
    assert run(2, selective, data=2, pipeline=2, schedule="zb-h1", shard=shard) == alone
