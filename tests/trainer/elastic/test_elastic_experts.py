"""Ranks that have experts are lost and replaced within the step; no bit changes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.parallel.optimizer.rules import groups
from holdfast.trainer.reports.metrics import load_of
from support.oracles.transformers_models import DEEPSEEK
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault, pace
from support.runs.small_runs import make_config, run_training
from support.soak import in_soak

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

SECTIONS: dict[str, Any] = {
    "model": {
        **DEEPSEEK,
        "layers": 1,
        "dense_layers": [],
        "experts": 16,
        "expert_intermediate": 24,
        "router_aux_loss_coef": 0.1,
        "router_bias_speed": 0.05,
        "multi_token_layers": 1,  # the head has experts, too
    },
    "train": {"steps": 5, "global_batch": 4, "seq_len": 32},
    "numerics": {"tensor_shards": 4},
}
KILLS = [(1, 2, "compute"), (6, 3, "backward"), (3, 5, "reduce")]
MARK = "HOLDFAST_TEST_DIED_BEFORE_BIASES"
"""The variable that names a file: the process that makes it dies."""


def die_before_biases() -> None:
    """Have the process that is first to come to the biases of step 3 die before they change."""
    update = groups._update

    def dying(rule: Any, updates: Any, step: Any, *rest: Any) -> None:
        if updates and updates[0].balance is not None and step == 3:
            try:
                Path(os.environ[MARK]).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        update(rule, updates, step, *rest)

    groups._update = dying  # pyrefly: ignore[bad-assignment]


@pytest.fixture(scope="module")
def alone(cluster: Cluster) -> dict[str, Any]:
    return run_training(cluster, make_config(**SECTIONS))


@pytest.fixture(scope="module")
def loads(cluster: Cluster) -> list[dict[str, float]]:
    """Of each step, by layer, the choices of the expert with most, over the mean."""
    config = msgspec.to_builtins(make_config(**SECTIONS))
    job = "support.runs.expert_runs:train_counting"
    [steps] = cluster.run(job, 1, timeout_s=120.0, config=config)
    return [{"block.0": load_of(of[1]).most, "head": load_of(of[2]).most} for of in steps]


SPREAD: dict[str, Any] = {**SECTIONS, "train": {**SECTIONS["train"], "global_batch": 8}}
SKEWED: dict[str, Any] = {
    "model": {
        "family": "mixtral",
        "layers": 1,
        "experts": 8,
        "experts_per_token": 1,
        "vocab": 8,
        "init_std": 0.3,  # routers that prefer two experts, which lie on one rank
    },
    "train": {"steps": 10, "global_batch": 4, "seq_len": 32, "seed": 1},
}


@pytest.mark.parametrize(
    ("ranks", "respawn", "shard"),
    [
        in_soak(8, True, "optimizer"),
        in_soak(4, False, "gradients"),
        (8, True, "parameters"),
    ],
    ids=["replaced", "two teams, not replaced", "replaced, sharded parameters"],
)
def test_three_of_eight_ranks_that_have_experts_alone_are_lost(
    start: Starter, cluster: Cluster, ranks: int, respawn: bool, shard: str
) -> None:
    """Each rank has 2 of 16 experts, as the only one or one of two."""
    expected = bits_of(run_training(cluster, make_config(**SPREAD)))
    run = start(
        **SPREAD,
        parallel={"data": 8, "expert": ranks, "shard": shard},
        elastic=pace(
            {
                "respawn": respawn,
                "local_nodes": 4,
                "chaos": [fault("kill", rank, step, phase) for rank, step, phase in KILLS],
            },
            1.0 if respawn else 0.1,
        ),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert len(run.events("rank_lost")) >= 3
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))


ONE_REPLICA_LESS: dict[str, Any] = {"respawn": False, "local_nodes": 4}


@pytest.mark.parametrize(
    ("sections", "parallel", "elastic", "recomputed"),
    [
        # Each rank has 2 of 8 micro-batches, and 4 of 16 experts alone.
        ({}, {"data": 4, "expert": 4}, {}, 2),
        in_soak({}, {"data": 4, "expert": 4}, {"expert_inputs_gib": 0}, 8),
        # Room for one micro-batch of a rank: 4 KiB of tokens, and of gradients, in two layers.
        ({}, {"data": 4, "expert": 4}, {"expert_inputs_gib": 24 * 2**-20}, 5),
        # A slice's tokens lie on two ranks; a replica that loses one of them computes anew.
        in_soak({}, {"data": 2, "tensor": 2, "expert": 4}, {}, 4),
        in_soak(
            {"train": {"context_chunks": 2, "recompute": "full", "precision": "bf16"}},
            {"data": 2, "context": 2, "expert": 4, "schedule": "zb-h1"},
            {},
            4,
        ),
        # Of two copies, one rank has lost the gradients of those that it worked for.
        ({}, {"data": 4, "expert": 4, "expert_replicas": 2}, {}, 2),
    ],
    ids=["alone", "nothing kept", "some kept", "tensor ranks", "slices in bf16", "two copies"],
)
def test_lost_gradients_of_experts_are_computed_from_what_these_were_sent(
    start: Starter,
    cluster: Cluster,
    sections: dict[str, Any],
    parallel: dict[str, Any],
    elastic: dict[str, Any],
    recomputed: int,
) -> None:
    """A rank dies when all micro-batches are done: only those of its replica are done again."""
    model = {**SPREAD, "train": SPREAD["train"] | sections.get("train", {})}
    expected = bits_of(run_training(cluster, make_config(**model)))
    chaos = [fault("kill", 3, 3, "reduce")]
    run = start(
        **model,
        parallel=parallel,
        elastic=pace(ONE_REPLICA_LESS | elastic | {"chaos": chaos}, 0.1),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    [event] = run.events("recovered")
    assert event["recomputed_micro_batches"] == recomputed
    assert event["from_checkpoint"] is None


def test_a_rank_whose_expert_matrices_muon_updates_is_lost(
    start: Starter, cluster: Cluster
) -> None:
    """The matrices and momenta of 4 of 16 experts lie on it alone, and in shadows."""
    matrices: dict[str, Any] = {**SPREAD, "optimizer": {"name": "muon", "lr": 2e-3}}
    expected = bits_of(run_training(cluster, make_config(**matrices)))
    chaos = [fault("kill", 2, 3, "reduce")]
    run = start(
        **matrices,
        parallel={"data": 4, "expert": 4},
        elastic=pace({"respawn": False, "local_nodes": 4, "chaos": chaos}, 0.1),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert [event["rank"] for event in run.events("rank_lost")] == [2]
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))


def test_copies_follow_the_loads_while_a_rank_is_killed(start: Starter, cluster: Cluster) -> None:
    """It is lost as state of copies is on its way, which then begins anew."""
    expected = bits_of(run_training(cluster, make_config(**SKEWED)))
    chaos = [fault("kill", 2, 3, "fill")]
    run = start(
        **SKEWED,
        parallel={"data": 4, "expert": 4, "expert_replicas": "auto"},
        elastic=pace({"expert_steps": 2, "local_nodes": 4, "chaos": chaos}, 0.5),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert [event["rank"] for event in run.events("rank_lost")] == [2]
    plans = [event["plan"] for event in run.events("generation")]
    assert any(plan["coming_hosts"] for plan in plans), "no placement was prepared beside steps"
    final = plans[-1]["placements"][plans[-1]["hosts"][1]]
    assert max(map(len, final)) > 1


@pytest.mark.parametrize("respawn", [in_soak(True), False], ids=["replaced", "not replaced"])
def test_three_of_eight_ranks_with_experts_are_lost(
    start: Starter,
    alone: dict[str, Any],
    loads: list[dict[str, float]],
    respawn: bool,
) -> None:
    """Each tensor rank has 4 of 16 experts; smaller groups have theirs too. No token is counted
    twice, or not at all, in the steps that are interrupted."""
    run = start(
        **SECTIONS,
        parallel={"tensor": 4, "data": 2},
        elastic=pace(
            {
                "respawn": respawn,
                "local_nodes": 4,
                "chaos": [fault("kill", rank, step, phase) for rank, step, phase in KILLS],
            },
            1.0 if respawn else 0.1,
        ),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == bits_of(alone)
    assert [[step["multi_token_loss_hex"]] for step in run.steps()] == alone["further"]
    assert [step["expert_load"] for step in run.steps()] == loads
    assert len(run.events("rank_lost")) >= 3
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))


def test_a_rank_that_dies_between_its_weights_and_its_biases_changes_no_bit(
    tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank's biases are those of another step than its weights, or than other ranks'."""
    monkeypatch.setenv(MARK, str(tmp_path / "died"))
    start = Starter(tmp_path, before="test_elastic_experts:die_before_biases")
    try:
        run = start(**SECTIONS, parallel={"data": 2}, elastic=pace({}, 0.5))
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    assert (tmp_path / "died").exists()
    assert run.bits() == bits_of(alone)
    (lost,) = run.events("rank_lost")
    assert lost["cause"] == "killed by SIGKILL"
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))


@pytest.mark.parametrize("phase", ["backward", "gather"])
def test_the_stage_that_predicts_a_second_token_loses_a_rank(
    start: Starter, alone: dict[str, Any], loads: list[dict[str, float]], phase: str
) -> None:
    """It has the second use of the embedding; none of its losses is told twice, or not at all."""
    run = start(
        **SECTIONS,
        parallel={"pipeline": 2, "data": 2, "blocks_per_chunk": [1, 0]},
        elastic=pace(
            {"respawn": False, "local_nodes": 4, "chaos": [fault("kill", 3, 3, phase)]}, 0.1
        ),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == bits_of(alone)
    assert [[step["multi_token_loss_hex"]] for step in run.steps()] == alone["further"]
    assert [step["expert_load"] for step in run.steps()] == loads
    assert len(run.events("rank_lost")) == 1
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))
