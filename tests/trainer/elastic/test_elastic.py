"""Ranks are lost for real, and the run has the bits of the run that lost none: steps, norms,
parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools.diff import diff_checkpoints
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault, pace, random_kills
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp]

BATCH = 6
STEPS = 22
LONG_RUN = {"steps": STEPS, "global_batch": BATCH}
SHORT_RUN = {"steps": 14, "global_batch": BATCH}
"""For runs that only lose ranks; in the others, ranks have time to join."""
SHALLOW = {"layers": 2}
"""For runs without stages, between which layers could move."""
PACE_S = 0.2
SLOW_S = 0.6
MOST_KILLS = 4
LAYOUTS = [
    {"data": 2, "pipeline": 2},
    {"data": 3, "pipeline": 1},
    {"data": 1, "pipeline": 3},
    {"data": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v", "blocks_per_chunk": [2, 1, 1, 2]},
]


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train=LONG_RUN)))


@pytest.fixture(scope="module")
def expected_short(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train=SHORT_RUN)))


@pytest.fixture(scope="module")
def shallow(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train=LONG_RUN, model=SHALLOW)))


@pytest.fixture(scope="module")
def shallow_short(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train=SHORT_RUN, model=SHALLOW)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: "-".join(map(str, v.values())))
def test_kills_in_every_phase_change_no_bit(
    start: Starter, expected: dict[str, Any], layout: dict[str, Any]
) -> None:
    last = layout["data"] * layout["pipeline"] - 1
    faults = [
        fault("kill", last, 2, "backward"),
        fault("kill", 1, 8, "reduce"),
        fault("kill", 0, 14, "vote"),
        fault("kill", last, 20, "apply", incarnation=1),
    ]
    elastic = pace(pace({"chaos": faults}, PACE_S), PACE_S, rank=1)
    run = start(train=LONG_RUN, parallel=layout, elastic=elastic)
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert len(run.events("fault_injected")) >= 5
    recovered = run.events("recovered")
    assert len(recovered) >= 3
    assert all(event["from_checkpoint"] is None for event in recovered)
    assert all(event["replayed_steps"] <= 1 for event in recovered)


@pytest.mark.parametrize("redundancy", [1, 2])
def test_kills_while_messages_are_on_their_way_change_no_bit(
    start: Starter, shallow_short: dict[str, Any], redundancy: int
) -> None:
    faults = [
        fault("kill", 2, 3, "exchange"),  # sums have arrived at some owners and not at others
        fault("kill", 1, 7, "gather"),  # an owner has sent a part of its parameters
        fault("kill", 0, 11, "compute"),  # parameters are awaited, and still leave
    ]
    run = start(
        train=SHORT_RUN,
        model=SHALLOW,
        parallel={"data": 4, "bucket_elements": 500},
        elastic=pace({"chaos": faults, "redundancy": redundancy, "respawn": False}, PACE_S, rank=3),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == shallow_short
    assert [event["rank"] for event in run.events("rank_lost")] == [2, 1, 0]
    recovered = run.events("recovered")
    assert all(event["from_checkpoint"] is None for event in recovered)
    assert all(event["replayed_steps"] <= 1 for event in recovered)


@pytest.mark.parametrize(
    ("shard", "group"), [("gradients", 0), ("parameters", 0), ("parameters", 2)], ids=str
)
def test_kills_of_ranks_that_share_gradients_and_parameters_change_no_bit(
    start: Starter, shallow_short: dict[str, Any], shard: str, group: int
) -> None:
    faults = [
        fault("kill", 2, 3, "prefetch" if shard == "parameters" else "reduce"),
        fault("kill", 1, 6, "exchange"),  # some keepers have a part of its gradients
        fault("kill", 3, 9, "gather"),  # its own parameters are updated, and no other's
        fault("kill", 0, 12, "compute"),
    ]
    run = start(
        train=SHORT_RUN,
        model=SHALLOW,
        parallel={"data": 4, "shard": shard, "shard_group": group},
        elastic=pace({"chaos": faults}, PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == shallow_short
    assert [event["rank"] for event in run.events("rank_lost")] == [2, 1, 3, 0]
    recovered = run.events("recovered")
    assert all(event["from_checkpoint"] is None for event in recovered)
    assert all(event["replayed_steps"] <= 1 for event in recovered)


@pytest.mark.parametrize(
    ("layout", "reduction", "kills", "recomputed"),
    [
        ({"data": 4}, "exact", [(2, 3, "reduce"), (1, 5, "vote")], [3, 4]),
        ({"data": 3, "tensor": 2}, "exact", [(2, 3, "vote"), (1, 5, "vote")], [4, 6]),
        ({"data": 4}, "fast", [(2, 3, "reduce")], [3]),
    ],
    ids=["exact", "exact-tensor", "fast"],
)
def test_only_the_lost_rank_s_micro_batches_are_computed_again(
    start: Starter,
    cluster: Cluster,
    layout: dict[str, int],
    reduction: str,
    kills: list[tuple[int, int, str]],
    recomputed: list[int],
) -> None:
    # Twelve micro-batches are shared out evenly; layers stay, since all stages lose alike.
    sections = {
        "model": {"layers": 2},
        "train": {"steps": 6},
        "numerics": {"reduction": reduction},
        "parallel": layout,
    }
    run = start(
        **sections,
        elastic={"respawn": False, "chaos": [fault("kill", *kill) for kill in kills]},
    )
    expected = bits_of(run_training(cluster, make_config(**sections)))
    assert run.finish() == 0, run.output()
    if reduction == "exact":
        assert run.bits() == expected
    else:
        found, wanted = (
            [float.fromhex(loss) for _, loss, _ in b["steps"]] for b in (run.bits(), expected)
        )
        assert found == pytest.approx(wanted, rel=1e-5)
    assert [e["recomputed_micro_batches"] for e in run.events("recovered")] == recomputed


@pytest.mark.parametrize("second", [3, 0], ids=["another", "who-was-to-record-the-first"])
def test_a_loss_while_the_state_after_another_is_compared_costs_nobody_else(
    start: Starter, shallow_short: dict[str, Any], second: int
) -> None:
    faults = [fault("kill", 2, 3, "reduce"), fault("kill", second, 3, "change")]
    run = start(
        train=SHORT_RUN,
        model=SHALLOW,
        parallel={"data": 4},
        elastic={"local_nodes": 4, "respawn": False, "chaos": faults},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == shallow_short
    assert [event["rank"] for event in run.events("rank_lost")] == [2, second]
    assert [event["from_checkpoint"] for event in run.events("recovered")] == [None, None]
    assert len(list((run.root / "incidents").iterdir())) == 2


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_losses_half_way_through_the_backward_passes_change_no_bit(
    start: Starter, expected_short: dict[str, Any], schedule: str
) -> None:
    # The second loss comes while the step is computed again after the first.
    faults = [
        fault("kill", 3, 4, "backward"),
        fault("kill", 4, 4, "reduce"),
        fault("kill", 1, 9, "backward"),
    ]
    run = start(
        train=SHORT_RUN,
        parallel={"data": 3, "pipeline": 2, "schedule": schedule},
        elastic={"local_nodes": 3, "respawn": False, "redundancy": 2, "chaos": faults},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected_short
    assert run.events("recovered")[0]["step"] == 3


def test_tensor_parallel_ranks_are_lost_and_replaced(start: Starter, cluster: Cluster) -> None:
    model, layout = {"layers": 2}, {"tensor": 2, "data": 2, "pipeline": 1}
    faults = [fault("kill", 3, 3, "reduce"), fault("kill", 0, 9, "compute")]
    train = {"steps": 12, "global_batch": 4}
    run = start(
        train=train,
        model=model,
        parallel=layout,
        elastic=pace({"chaos": faults}, PACE_S, rank=1),
    )
    assert run.finish() == 0, run.output()
    config = make_config(train=train, model=model, parallel={**layout, "data": 1})
    assert run.bits() == bits_of(run_training(cluster, config))
    assert [event["rank"] for event in run.events("rank_lost")] == [3, 0]


def test_kills_change_no_bit_of_matrices_groups_moments_and_averages(
    start: Starter, cluster: Cluster
) -> None:
    train, model = {"steps": 10, "global_batch": BATCH, "precision": "bf16"}, {"layers": 4}
    optimizer = {
        "name": "muon",
        "moments_dtype": "bf16",
        "ema": 0.9,
        "groups": [{"match": "*k_proj*", "lr": 3e-3}, {"match": "lm_head*", "weight_decay": 0.0}],
    }
    sections = {"train": train, "model": model, "optimizer": optimizer}
    expected = bits_of(run_training(cluster, make_config(**sections)))
    faults = [fault("kill", 1, 3, "vote"), fault("kill", 2, 6, "apply")]
    run = start(
        **sections,
        parallel={"data": 2, "pipeline": 2},
        elastic=pace({"chaos": faults, "verify_every": 2}, PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert not run.events("corruption")
    assert len(run.events("recovered")) >= 2
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))


def test_masters_come_from_shadows_and_so_do_checkpoints(start: Starter, cluster: Cluster) -> None:
    train = {"steps": 16, "precision": "bf16", "global_batch": BATCH}
    model = {"tie_embeddings": True, "layers": 2}
    expected = bits_of(run_training(cluster, make_config(train=train, model=model)))
    saved = []
    for memory in ("device", "host"):
        faults = [fault("kill", 1, 4, "vote"), fault("kill", 2, 9, "apply")]
        run = start(
            train=train,
            model=model,
            parallel={"data": 2, "pipeline": 2},
            checkpoint={"every": 2, "keep": 0},
            elastic=pace({"chaos": faults, "shadow_memory": memory, "verify_every": 2}, PACE_S),
        )
        assert run.finish() == 0, run.output()
        assert run.bits() == expected
        assert not run.events("corruption")
        assert all(event["from_checkpoint"] is None for event in run.events("recovered"))
        saved.append(run.root / "checkpoints")
    # A save that a loss interrupts is given up for the next one's sake, so that some steps are
    # missing.
    names = [{path.name for path in LocalStore(root).paths()} for root in saved]
    both = sorted(names[0] & names[1])
    assert both[-1] == "step-00000016"
    assert len(both) >= 3
    for name in (*both[:2], both[-1]):
        difference = diff_checkpoints(saved[0] / name, saved[1] / name)
        assert difference.equal, difference.as_dict()


def test_hung_ranks_are_named_and_replaced(start: Starter, expected: dict[str, Any]) -> None:
    faults = [
        fault("stop", 3, 3, "reduce"),
        fault("hold-lock", 2, 9),
        fault("exit", 1, 16, "vote"),
    ]
    run = start(
        train=LONG_RUN,
        parallel={"data": 2, "pipeline": 2},
        elastic=pace({"chaos": faults, "hang_timeout_s": 1.5, "heartbeat_timeout_ms": 600}, PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    incidents = [json.loads(path.read_text()) for path in sorted(run.root.glob("incidents/*.json"))]
    assert {loss["rank"] for incident in incidents for loss in incident["losses"]} == {1, 2, 3}
    for incident in incidents:
        assert incident["plan_before"] != incident["plan_after"]
        assert len(incident["state_digest"]) == 64
        assert any(member["reported"]["operations"] for member in incident["after"])
    causes = {event["rank"]: event["cause"] for event in run.events("rank_lost")}
    assert causes[3].startswith(("stopped by a signal", "no heartbeat"))
    assert "its interpreter has not run" in causes[2]
    assert causes[1] == "exited with code 1"


def test_a_slow_rank_is_named_once_and_changes_no_bit(start: Starter, cluster: Cluster) -> None:
    train = {"steps": 14, "global_batch": BATCH}
    elastic = {"straggler_every": 3, **pace({}, SLOW_S, rank=1)}
    run = start(train=train, model=SHALLOW, parallel={"data": 3}, elastic=elastic)
    expected = bits_of(run_training(cluster, make_config(train=train, model=SHALLOW)))
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    slow = [event for event in run.events("straggler") if event["rank"] == 1]
    assert len(slow) == 1
    assert slow[0]["phase"] == "compute"
    assert slow[0]["own_s"] > SLOW_S
    assert not run.events("rank_lost")


def test_a_node_is_lost_with_all_its_workers(
    start: Starter, expected_short: dict[str, Any]
) -> None:
    run = start(
        train=SHORT_RUN,
        parallel={"data": 2, "pipeline": 2},
        elastic=pace({"local_nodes": 2}, PACE_S),
    )
    run.wait_for_step(5)
    worker = run.living()[3]
    fork_server = _parent(worker["pid"])
    os.kill(_parent(fork_server), signal.SIGKILL)  # the node's agent; its workers die with it
    assert run.finish() == 0, run.output()
    assert run.bits() == expected_short
    lost = {event["rank"] for event in run.events("rank_lost")}
    assert lost == {2, 3}


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_without_shadows_the_newest_checkpoint_is_the_last_resort(
    start: Starter, shallow_short: dict[str, Any]
) -> None:
    run = start(
        train=SHORT_RUN,
        model=SHALLOW,
        parallel={"data": 2},
        checkpoint={"every": 4},
        elastic={"redundancy": 0, "chaos": [fault("kill", 1, 11, "reduce")]},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == shallow_short
    (loaded,) = [e["from_checkpoint"] for e in run.events("recovered")]
    assert loaded in (4, 8)


def test_a_node_that_announces_its_departure_is_let_go(
    start: Starter, expected_short: dict[str, Any]
) -> None:
    run = start(
        train=SHORT_RUN,
        parallel={"data": 2, "pipeline": 2},
        elastic=pace({"respawn": False}, PACE_S),
    )
    run.wait_for_step(5)
    agent = _parent(_parent(run.living()[3]["pid"]))
    os.kill(agent, signal.SIGTERM)
    assert run.finish() == 0, run.output()
    assert run.bits() == expected_short
    assert all(event["replayed_steps"] == 0 for event in run.events() if "plan" in event)


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(
    start: Starter, shallow: dict[str, Any], tmp_path: Path
) -> None:
    run = start(
        name="first",
        train=LONG_RUN,
        model=SHALLOW,
        parallel={"data": 2},
        elastic=pace({}, PACE_S),
    )
    run.wait_for_step(5)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 3, run.output()
    again = start.start(tmp_path / "first.toml", "first")
    assert again.finish() == 0, again.output()
    assert again.bits() == shallow
    (resumed,) = again.events("resumed")
    assert resumed["step"] >= 5


def test_kills_at_random_instants_change_no_bit(start: Starter, expected: dict[str, Any]) -> None:
    for seed, layout in ((1, {"data": 2, "pipeline": 2}), (2, {"data": 3, "pipeline": 1})):
        run = start(
            train=LONG_RUN,
            parallel=layout,
            checkpoint={"every": 5},
            elastic=pace(pace({}, PACE_S), PACE_S, rank=1),
        )
        members = layout["data"] * layout["pipeline"]
        # As many as a minute's test can bear; the storm has more (test_kill_storm.py).
        kills = list(islice(random_kills(run, seed, members=members, gap_s=0.4), MOST_KILLS))
        assert run.finish() == 0, run.output()
        assert run.bits() == expected, kills
        assert kills


@pytest.mark.parametrize("redundancy", [1, 2])
def test_a_flipped_bit_is_named_and_the_run_has_the_right_bits_again(
    start: Starter, shallow: dict[str, Any], redundancy: int
) -> None:
    elastic = {
        "local_nodes": 3,
        "redundancy": redundancy,
        "verify_every": 5,
        "chaos": [fault("corrupt-memory", 1, 13)],
    }
    run = start(
        train=LONG_RUN,
        model=SHALLOW,
        parallel={"data": 3},
        checkpoint={"every": 4},
        elastic=elastic,
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == shallow
    found = run.events("corruption")
    assert found
    assert all(event["step"] == 15 and 1 in event["ranks"] for event in found)
    # With two shadows the majority knows which copy is wrong; rank 1 owns it, so steps 13 to 15 are
    # void.
    assert all(event["ranks"] == [1] for event in found) == (redundancy == 2)
    (loaded,) = [e["from_checkpoint"] for e in run.events("generation") if e["generation"] > 1]
    assert loaded == 8


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    start: Starter, shallow: dict[str, Any], tmp_path: Path
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = start(
            train=LONG_RUN,
            model=SHALLOW,
            parallel={"data": 2},
            checkpoint={"every": 4, "path": str(mount)},
            elastic=pace({"chaos": [fault("fill-disk", 1, 7, seconds=2.0)]}, PACE_S),
        )
        assert run.finish() == 0, run.output()
        assert run.bits() == shallow
        failed = run.events("checkpoint_failed")
        assert failed
        assert all("free space, or lower" in event["error"] for event in failed), failed
        committed = [event["step"] for event in run.events("checkpoint_committed")]
        assert committed[-1] == STEPS
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_faults_can_be_caused_while_a_run_goes_on(start: Starter, shallow: dict[str, Any]) -> None:
    def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "holdfast.launch.cli", "chaos", str(run.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    run = start(train=LONG_RUN, model=SHALLOW, parallel={"data": 2}, elastic=pace({}, PACE_S))
    run.wait_for_step(3)
    assert chaos("--rank", "1").stdout == "kill: rank 1\n"
    run.wait_until(lambda: bool(run.events("rank_lost")), "the loss is agreed on")
    assert (
        "exit: rank 0 at step 16, vote"
        in chaos(*("--fault", "exit", "--rank", "0", "--step", "16", "--phase", "vote")).stdout
    )
    late = chaos("--fault", "exit", "--step", "2")
    assert late.returncode == 2
    assert late.stderr.startswith("holdfast: --step 2 is over: the run has taken ")
    assert run.finish() == 0, run.output()
    assert run.bits() == shallow
    caused = [(e["fault"], e["rank"]) for e in run.events("fault_injected")]
    assert caused == [("slow", 0), ("kill", 1), ("exit", 0)]
    ended = chaos()
    assert ended.returncode == 2
    assert ended.stderr == f"holdfast: no worker of {run.root} lives on this machine\n"
    wrong = chaos("--fault", "earthquake")
    assert wrong.returncode == 2
