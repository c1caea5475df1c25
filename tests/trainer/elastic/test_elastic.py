"""Ranks are lost for real, and the run has the bits of the run that lost none: steps, norms,
parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools.diff import diff_checkpoints
from support.processes.cluster import Cluster
from support.runs.commands import holdfast
from support.runs.elastic_runs import Starter, Undisturbed, fault, pace, random_kills
from support.runs.small_runs import make_config, run_in

pytestmark = [pytest.mark.mp]

TRAIN = {"steps": 9, "global_batch": 5}
"""For runs without stages, between which layers could move; micro-batches are shared unevenly."""
SHALLOW = {"layers": 2}
STAGED = {"layers": 4}
PACE_S = 0.4
"""Nothing is computed meanwhile: ranks have time to join though there are few steps."""
SLOW_S = 1.0
MOST_KILLS = 5
LAYOUTS = [
    {"data": 1, "pipeline": 3, "blocks_per_chunk": [1, 1, 2]},
    {"data": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v", "blocks_per_chunk": [0, 1, 1, 2]},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: "-".join(map(str, v.values())))
def test_kills_in_every_phase_change_no_bit(
    start: Starter, undisturbed: Undisturbed, layout: dict[str, Any]
) -> None:
    last = layout["data"] * layout["pipeline"] - 1
    faults = [
        fault("kill", last, 2, "backward"),
        fault("kill", 1, 5, "reduce"),
        fault("kill", 0, 8, "vote"),
        fault("kill", last, 10, "apply", incarnation=1),
    ]
    elastic = pace(pace({"chaos": faults}, 2 * PACE_S), 2 * PACE_S, rank=1)
    sections = {"train": {**TRAIN, "steps": 11}, "model": STAGED}
    run = start(**sections, parallel=layout, elastic=elastic)
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    assert len(run.events("fault_injected")) >= 5
    recovered = run.events("recovered")
    assert len(recovered) >= 3
    assert all(event["from_checkpoint"] is None for event in recovered)
    assert all(event["replayed_steps"] <= 1 for event in recovered)


@pytest.mark.parametrize("redundancy", [1, 2])
def test_kills_while_messages_are_on_their_way_change_no_bit(
    start: Starter, undisturbed: Undisturbed, redundancy: int
) -> None:
    faults = [
        fault("kill", 2, 2, "exchange"),  # sums have arrived at some owners and not at others
        fault("kill", 1, 4, "gather"),  # an owner has sent a part of its parameters
        fault("kill", 0, 6, "compute"),  # parameters are awaited, and still leave
    ]
    sections = {"train": {**TRAIN, "steps": 7}, "model": SHALLOW}
    run = start(
        **sections,
        parallel={"data": 4, "bucket_elements": 500},
        elastic=pace({"chaos": faults, "redundancy": redundancy, "respawn": False}, PACE_S, rank=3),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    assert [event["rank"] for event in run.events("rank_lost")] == [2, 1, 0]
    recovered = run.events("recovered")
    assert all(event["from_checkpoint"] is None for event in recovered)
    assert all(event["replayed_steps"] <= 1 for event in recovered)


@pytest.mark.parametrize(
    ("shard", "group", "replaced"),
    [("gradients", 0, False), ("parameters", 0, False), ("parameters", 2, True)],
    ids=str,
)
def test_kills_of_ranks_that_share_gradients_and_parameters_change_no_bit(
    start: Starter, undisturbed: Undisturbed, shard: str, group: int, replaced: bool
) -> None:
    kills = [
        (2, 2, "prefetch" if shard == "parameters" else "reduce"),
        (1, 4, "exchange"),  # some keepers have a part of its gradients
        (3, 6, "gather"),  # its own parameters are updated, and no other's
        (0, 8, "compute"),
    ]
    if replaced:  # which takes a step or two
        kills = [(rank, step + step // 2, phase) for rank, step, phase in kills]
    sections = {"train": {**TRAIN, "steps": kills[-1][1] + 2}, "model": SHALLOW}
    run = start(
        **sections,
        parallel={"data": 4 if replaced else 5, "shard": shard, "shard_group": group},
        elastic=pace(
            {"chaos": [fault("kill", *kill) for kill in kills], "respawn": replaced}, PACE_S
        ),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    assert [event["rank"] for event in run.events("rank_lost")] == [rank for rank, *_ in kills]
    recovered = run.events("recovered")
    assert all(event["from_checkpoint"] is None for event in recovered)
    assert all(event["replayed_steps"] <= 1 for event in recovered)


@pytest.mark.parametrize(
    ("layout", "reduction", "kills", "recomputed"),
    [
        ({"data": 3}, "exact", [(2, 2, "reduce"), (1, 3, "vote")], [2, 3]),
        ({"data": 2, "tensor": 2}, "exact", [(2, 2, "vote")], [3]),
        ({"data": 3}, "fast", [(2, 2, "reduce")], [2]),
    ],
    ids=["exact", "exact-tensor", "fast"],
)
def test_only_the_lost_rank_s_micro_batches_are_computed_again(
    start: Starter,
    undisturbed: Undisturbed,
    layout: dict[str, int],
    reduction: str,
    kills: list[tuple[int, int, str]],
    recomputed: list[int],
) -> None:
    # Six micro-batches are shared out evenly; layers stay, since all stages lose alike.
    sections = {
        "model": SHALLOW,
        "train": {"steps": 3, "global_batch": 6},
        "numerics": {"reduction": reduction},
    }
    run = start(
        **sections,
        parallel=layout,
        elastic={"respawn": False, "chaos": [fault("kill", *kill) for kill in kills]},
    )
    expected = undisturbed(**sections, parallel={**layout, "data": 1})
    assert run.finish() == 0, run.output()
    if reduction == "exact":
        assert run.bits() == expected
    else:
        found, wanted = (
            [float.fromhex(loss) for _, loss, _ in b["steps"]] for b in (run.bits(), expected)
        )
        assert found == pytest.approx(wanted, rel=1e-5)
    assert [e["recomputed_micro_batches"] for e in run.events("recovered")] == recomputed


def test_a_loss_while_the_state_after_another_is_compared_costs_nobody_else(
    start: Starter, undisturbed: Undisturbed
) -> None:
    faults = [
        *(fault("kill", 2, 2, "reduce"), fault("kill", 3, 2, "change")),
        # Rank 0 was to record the loss before its own.
        *(fault("kill", 4, 4, "reduce"), fault("kill", 0, 4, "change")),
    ]
    sections = {"train": {**TRAIN, "steps": 5}, "model": SHALLOW}
    run = start(
        **sections,
        parallel={"data": 5},
        elastic={"local_nodes": 5, "respawn": False, "chaos": faults},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    assert [event["rank"] for event in run.events("rank_lost")] == [2, 3, 4, 0]
    assert [event["from_checkpoint"] for event in run.events("recovered")] == [None] * 4
    assert len(list(run.root.glob("incidents/generation-*.json"))) == 4


def test_losses_half_way_through_the_backward_passes_change_no_bit(
    start: Starter, undisturbed: Undisturbed
) -> None:
    # The second loss comes while the step is computed again after the first.
    faults = [
        fault("kill", 3, 2, "backward"),
        fault("kill", 4, 2, "reduce"),
        fault("kill", 1, 4, "backward"),
    ]
    sections = {"train": {"steps": 5, "global_batch": 6}, "model": STAGED}
    run = start(
        **sections,
        parallel={"data": 3, "pipeline": 2, "schedule": "zb-h1"},
        elastic={"local_nodes": 3, "respawn": False, "redundancy": 2, "chaos": faults},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    assert run.events("recovered")[0]["step"] == 1


def test_tensor_parallel_ranks_are_lost_and_replaced(
    start: Starter, undisturbed: Undisturbed
) -> None:
    faults = [fault("kill", 3, 2, "reduce"), fault("kill", 0, 5, "compute")]
    sections = {"train": {"steps": 6, "global_batch": 2}, "model": SHALLOW}
    run = start(
        **sections,
        parallel={"tensor": 2, "data": 2},
        elastic=pace({"chaos": faults}, 3 * PACE_S, rank=1),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections, parallel={"tensor": 2})
    assert [event["rank"] for event in run.events("rank_lost")] == [3, 0]


def test_kills_change_no_bit_of_matrices_groups_moments_and_averages(
    start: Starter, undisturbed: Undisturbed
) -> None:
    """Masters, too, come from shadows in the device's memory, and matrices are whole with one rank,
    though each rank computes with a part."""
    optimizer = {
        "name": "muon",
        "moments_dtype": "bf16",
        "ema": 0.9,
        "groups": [{"match": "*k_proj*", "lr": 3e-3}, {"match": "lm_head*", "weight_decay": 0.0}],
    }
    train = {"steps": 6, "global_batch": 3, "precision": "bf16"}
    numerics = {"tensor_shards": 2}
    sections = {"train": train, "model": STAGED, "optimizer": optimizer, "numerics": numerics}
    faults = [fault("kill", 1, 2, "vote"), fault("kill", 2, 5, "apply")]
    run = start(
        **sections,
        parallel={"data": 2, "tensor": 2},
        elastic=pace({"chaos": faults, "verify_every": 2, "shadow_memory": "device"}, 2 * PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    assert not run.events("corruption")
    assert len(run.events("recovered")) >= 2
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))


def test_masters_come_from_shadows_and_so_do_checkpoints(
    start: Starter, cluster: Cluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    sections = {
        "train": {"steps": 8, "precision": "bf16", "global_batch": 3},
        "model": {"tie_embeddings": True, **SHALLOW},
    }
    checkpoint = {"every": 1, "keep": 0}
    run_in(cluster, make_config(**sections, checkpoint=checkpoint), tmp_path / "undisturbed")
    faults = [fault("kill", 1, 3, "vote"), fault("kill", 2, 6, "apply")]
    run = start(
        **sections,
        parallel={"data": 2, "pipeline": 2},
        checkpoint=checkpoint,
        elastic=pace({"chaos": faults, "shadow_memory": "host", "verify_every": 2}, 2 * PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    assert not run.events("corruption")
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))
    # A save that a loss interrupts is given up for the next one's sake, so that some steps are
    # missing.
    saved = [root / "checkpoints" for root in (tmp_path / "undisturbed", run.root)]
    names = [{path.name for path in LocalStore(root).paths()} for root in saved]
    both = sorted(names[0] & names[1])
    assert both[-1] == "step-00000008"
    assert len(both) >= 3
    for name in (*both[:2], *both[-2:]):
        difference = diff_checkpoints(saved[0] / name, saved[1] / name)
        assert difference.equal, difference.as_dict()


def test_hung_ranks_are_named_and_replaced(start: Starter, undisturbed: Undisturbed) -> None:
    faults = [
        fault("stop", 3, 2, "reduce"),
        fault("hold-lock", 2, 5),
        fault("exit", 1, 8, "vote"),
    ]
    sections = {"train": TRAIN, "model": STAGED}
    run = start(
        **sections,
        parallel={"data": 2, "pipeline": 2},
        elastic=pace({"chaos": faults, "hang_timeout_s": 2.0}, 2 * PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    incidents = [
        json.loads(path.read_text())
        for path in sorted(run.root.glob("incidents/generation-*.json"))
    ]
    assert {loss["rank"] for incident in incidents for loss in incident["losses"]} == {1, 2, 3}
    for incident in incidents:
        assert incident["plan_before"] != incident["plan_after"]
        assert len(incident["state_digest"]) == 64
        assert any(member["reported"]["operations"] for member in incident["after"])
    causes = {event["rank"]: event["cause"] for event in run.events("rank_lost")}
    assert causes[3].startswith(("stopped by a signal", "no heartbeat"))
    assert "its interpreter has not run" in causes[2]
    assert causes[1] == "exited with code 1"


def test_a_slow_rank_is_named_once_and_changes_no_bit(
    start: Starter, undisturbed: Undisturbed
) -> None:
    sections = {"train": {"steps": 10, "global_batch": 6}, "model": SHALLOW}
    elastic = {"straggler_every": 2, **pace({}, SLOW_S, rank=1)}
    run = start(**sections, parallel={"data": 3}, elastic=elastic)
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    slow = [event for event in run.events("straggler") if event["rank"] == 1]
    assert len(slow) == 1
    assert slow[0]["phase"] == "compute"
    assert slow[0]["own_s"] > SLOW_S
    assert not run.events("rank_lost")


def test_a_node_is_let_go_and_another_is_lost_with_all_its_workers(
    start: Starter, undisturbed: Undisturbed
) -> None:
    sections = {"train": {**TRAIN, "global_batch": 6}, "model": STAGED}
    run = start(
        **sections,
        parallel={"data": 3, "pipeline": 2},
        elastic=pace({"local_nodes": 3}, PACE_S),
    )
    run.wait_for_step(2)
    os.kill(run.agent(5), signal.SIGTERM)  # it announces its departure
    run.wait_for_members(4)
    assert not run.events("rank_lost")
    assert all(event["replayed_steps"] == 0 for event in run.events() if "plan" in event)
    os.kill(run.agent(3), signal.SIGKILL)  # its workers die with it
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    lost = {event["rank"] for event in run.events("rank_lost")}
    assert lost == {2, 3}


def test_without_shadows_the_newest_checkpoint_is_the_last_resort(
    start: Starter, undisturbed: Undisturbed
) -> None:
    sections = {"train": {**TRAIN, "steps": 7}, "model": SHALLOW}
    run = start(
        **sections,
        parallel={"data": 2},
        checkpoint={"every": 2},
        elastic={"redundancy": 0, "chaos": [fault("kill", 1, 6, "reduce")]},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    (loaded,) = [e["from_checkpoint"] for e in run.events("recovered")]
    assert loaded in (2, 4)


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(
    start: Starter, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    sections = {"train": {**TRAIN, "steps": 7}, "model": SHALLOW}
    run = start(name="first", **sections, parallel={"data": 2}, elastic=pace({}, PACE_S))
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 3, run.output()
    again = start.start(tmp_path / "first.toml", "first")
    assert again.finish() == 0, again.output()
    assert again.bits() == undisturbed(**sections)
    (resumed,) = again.events("resumed")
    assert resumed["step"] >= 2


def test_kills_at_random_instants_change_no_bit(start: Starter, undisturbed: Undisturbed) -> None:
    sections = {"train": {**TRAIN, "steps": 16}, "model": STAGED}
    run = start(
        **sections,
        parallel={"data": 2, "pipeline": 2},
        checkpoint={"every": 5},
        elastic=pace(pace({}, PACE_S), PACE_S, rank=1),
    )
    # As many as a minute's test can bear; the storm has more (test_kill_storm.py).
    kills = list(islice(random_kills(run, 1, members=4, gap_s=0.4), MOST_KILLS))
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections), kills
    assert kills


@pytest.mark.parametrize("redundancy", [1, 2])
def test_a_flipped_bit_is_named_and_the_run_has_the_right_bits_again(
    start: Starter, undisturbed: Undisturbed, redundancy: int
) -> None:
    sections = {"train": {**TRAIN, "steps": 7}, "model": SHALLOW}
    run = start(
        **sections,
        parallel={"data": 3},
        checkpoint={"every": 2},
        elastic={
            "local_nodes": 3,
            "redundancy": redundancy,
            "verify_every": 3,
            "chaos": [fault("corrupt-memory", 1, 5)],
        },
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    found = run.events("corruption")
    assert found
    assert all(event["step"] == 6 and 1 in event["ranks"] for event in found)
    # With two shadows the majority knows which copy is wrong; rank 1 owns it, so steps 5 and 6 are
    # void. What was saved after step 3 was not compared.
    assert all(event["ranks"] == [1] for event in found) == (redundancy == 2)
    (loaded,) = [e["from_checkpoint"] for e in run.events("generation") if e["generation"] > 1]
    assert loaded == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    start: Starter, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    sections = {"train": TRAIN, "model": SHALLOW}
    try:
        run = start(
            **sections,
            parallel={"data": 2},
            checkpoint={"every": 2, "path": str(mount)},
            elastic=pace({"chaos": [fault("fill-disk", 1, 4, seconds=2.0)]}, PACE_S),
        )
        assert run.finish() == 0, run.output()
        assert run.bits() == undisturbed(**sections)
        failed = run.events("checkpoint_failed")
        assert failed
        assert all("free space, or lower" in event["error"] for event in failed), failed
        committed = [event["step"] for event in run.events("checkpoint_committed")]
        assert committed[-1] == TRAIN["steps"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_faults_can_be_caused_while_a_run_goes_on(
    start: Starter, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
        return holdfast(tmp_path, "chaos", str(run.root), *arguments)

    sections = {"train": TRAIN, "model": SHALLOW}
    run = start(**sections, parallel={"data": 2}, elastic=pace({}, 2 * PACE_S))
    run.wait_for_step(3)
    assert chaos("--rank", "1").stdout == "kill: rank 1\n"
    run.wait_until(lambda: bool(run.events("rank_lost")), "the loss is agreed on")
    assert (
        "exit: rank 0 at step 8, apply"
        in chaos(*("--fault", "exit", "--rank", "0", "--step", "8", "--phase", "apply")).stdout
    )
    late = chaos("--fault", "exit", "--step", "2")
    assert late.returncode == 2
    assert late.stderr.startswith("holdfast: --step 2 is over: the run has taken ")
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    caused = [(e["fault"], e["rank"]) for e in run.events("fault_injected")]
    assert caused == [("slow", 0), ("kill", 1), ("exit", 0)]
    ended = chaos()
    assert ended.returncode == 2
    assert ended.stderr == f"holdfast: no worker of {run.root} lives on this machine\n"
    wrong = chaos("--fault", "earthquake")
    assert wrong.returncode == 2
