"""Training with offloaded activations: the same bits in every schedule and layout."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from torch.distributed import Store

from holdfast.parallel.plan.cost import peak_activation_bytes
from holdfast.trainer.config import RunConfig, dump_toml
from holdfast.trainer.plan_report.report import plan_report
from holdfast.trainer.step.planning import plan_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import HOLDFAST, Starter, bits_of, fault, pace
from support.runs.small_runs import (
    events_of,
    make_config,
    metrics_of,
    run_training,
    train_in,
    train_steps,
    world_size_of,
)

pytestmark = pytest.mark.mp

TRAIN = {"steps": 2, "global_batch": 4}


def offload(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"activations": "ssd", "path": str(folder), "smallest_kib": 1, **keys}


def train_offloaded(rank: int, world_size: int, store: Store, *, config: dict) -> dict[str, Any]:
    """As `train_steps`, what each step has sent, and which chunk inputs are in memory when the very
    first backward pass begins.
    """
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef

    from holdfast.parallel.offload import Offloader
    from holdfast.parallel.pipeline import Passage
    from holdfast.parallel.pipeline.runner import ModelChunkRunner
    from holdfast.trainer.step.training import Training

    sent: list[int] = []
    inputs: list[StorageWeakRef] = []
    alive: list[int] = []
    compute, forward, backward = Training.compute, ModelChunkRunner.forward, Offloader.backward

    def compute_and_note(self: Training, step: int, *at: Any) -> Any:
        times = compute(self, step, *at)
        assert self.offloader is not None
        sent.append(self.offloader.last_step.sent_bytes)
        return times

    def forward_and_note(
        self: ModelChunkRunner, passage: Passage, value: Tensor | None
    ) -> Tensor | None:
        if value is not None and not alive:
            inputs.append(StorageWeakRef(value.untyped_storage()))
        return forward(self, passage, value)

    def count_and_go_back(self: Offloader, key: Any) -> None:
        if not alive:
            self.drain()
            alive.append(sum(not seen.expired() for seen in inputs))
        backward(self, key)

    with (
        mock.patch.object(Training, "compute", compute_and_note),
        mock.patch.object(ModelChunkRunner, "forward", forward_and_note),
        mock.patch.object(Offloader, "backward", count_and_go_back),
    ):
        result = train_steps(rank, world_size, store, config=config)
    return {"result": result, "sent": sent, "inputs": len(inputs), "alive": alive[0]}


def ranks_offloaded(cluster: Cluster, config: RunConfig) -> list[dict[str, Any]]:
    """Train on the pool; every rank must have sent something in every step, and see the same."""
    plain, job = msgspec.to_builtins(config), "test_offload_training:train_offloaded"
    ranks = cluster.run(job, world_size_of(config), config=plain)
    assert all(min(rank["sent"]) > 0 for rank in ranks), [rank["sent"] for rank in ranks]
    assert all(rank["result"] == ranks[0]["result"] for rank in ranks)
    return ranks


def run_offloaded(cluster: Cluster, config: RunConfig) -> dict[str, Any]:
    """As `ranks_offloaded`; what all saw."""
    return ranks_offloaded(cluster, config)[0]["result"]


@pytest.fixture(scope="module")
def one_process(cluster: Cluster) -> dict[str, Any]:
    return run_training(cluster, make_config(train=TRAIN))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"data": 2},
        {"data": 2, "pipeline": 2, "shard": "parameters"},
        {
            "pipeline": 2,
            "data": 2,
            "schedule": "gpipe",
            "virtual": 2,
            "blocks_per_chunk": [2, 1, 1, 2],
        },
        {"pipeline": 3, "schedule": "zb-h1"},
        {"pipeline": 3, "virtual": 2, "schedule": "zb-v"},
        {"pipeline": 2, "data": 2, "micro_batch_order": "shuffled"},
    ],
    ids=lambda v: "-".join(map(str, v.values())) or "alone",
)
def test_offload_gives_the_same_bits(
    cluster: Cluster, tmp_path: Path, one_process: dict[str, Any], layout: dict[str, Any]
) -> None:
    config = make_config(train=TRAIN, parallel=layout, offload=offload(tmp_path))
    assert run_offloaded(cluster, config) == one_process


@pytest.mark.parametrize(
    ("layout", "inputs"),
    [
        ({"pipeline": 3, "schedule": "1f1b"}, [0, 2, 1]),
        ({"pipeline": 2, "virtual": 3, "schedule": "interleaved-1f1b"}, [4, 5]),
        (
            {"pipeline": 2, "virtual": 2, "schedule": "zb-v", "blocks_per_chunk": [2, 1, 1, 2]},
            [1, 4],
        ),
    ],
    ids=["1f1b", "interleaved-1f1b", "zb-v"],
)
def test_inputs_of_chunks_leave_memory_too(
    cluster: Cluster,
    tmp_path: Path,
    one_process: dict[str, Any],
    layout: dict[str, Any],
    inputs: list[int],
) -> None:
    """And the bits are the same in these schedules."""
    config = make_config(train=TRAIN, parallel=layout, offload=offload(tmp_path))
    ranks = ranks_offloaded(cluster, config)
    assert ranks[0]["result"] == one_process
    assert [rank["inputs"] for rank in ranks] == inputs
    assert [rank["alive"] for rank in ranks] == [0] * len(ranks)


@pytest.mark.parametrize(
    ("recompute", "layout"),
    [("full", {}), ("selective", {"pipeline": 2, "schedule": "zb-h1"})],
    ids=str,
)
def test_offload_and_recompute_give_the_same_bits(
    cluster: Cluster,
    tmp_path: Path,
    one_process: dict[str, Any],
    layout: dict[str, Any],
    recompute: str,
) -> None:
    train = TRAIN | {"recompute": recompute}
    config = make_config(train=train, parallel=layout, offload=offload(tmp_path))
    assert run_offloaded(cluster, config) == one_process


def test_a_choice_for_each_layer_gives_the_same_bits(
    cluster: Cluster, tmp_path: Path, one_process: dict[str, Any]
) -> None:
    layout = {"pipeline": 2, "schedule": "zb-h1"}
    kept = peak_activation_bytes(plan_of(make_config(train=TRAIN, parallel=layout)), 0)
    train = TRAIN | {"recompute": "auto", "activation_gib": 0.6 * kept / 2**30, "tflops": 1e-3}
    config = make_config(train=train, parallel=layout, offload=offload(tmp_path, drive_gbytes=1.0))
    ways = {layer.recompute for layer in plan_of(config).layers}
    assert len(ways) > 1
    assert run_offloaded(cluster, config) == one_process


def test_a_part_that_is_sent_gives_the_same_bits(
    cluster: Cluster, tmp_path: Path, one_process: dict[str, Any]
) -> None:
    part = offload(tmp_path, least_share=0.5, most_share=0.5)
    layout = {"pipeline": 2, "virtual": 3, "schedule": "interleaved-1f1b"}
    config = make_config(train=TRAIN, parallel=layout, offload=part)
    assert run_offloaded(cluster, config) == one_process


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_offload_with_tensor_parallelism_gives_the_same_bits(
    cluster: Cluster, tmp_path: Path, sequence_parallel: bool
) -> None:
    model = {"layers": 2, "tie_embeddings": True}
    layout = {"tensor": 2, "sequence_parallel": sequence_parallel}
    train = TRAIN | {"precision": "bf16", "micro_batch": 2}
    expected = run_training(cluster, make_config(model=model, train=train, parallel=layout))
    config = make_config(
        model=model,
        train=train,
        parallel=layout | {"pipeline": 2},
        offload=offload(tmp_path),
    )
    assert run_offloaded(cluster, config) == expected


def test_a_run_says_what_it_sends(cluster: Cluster, tmp_path: Path) -> None:
    keys = offload(tmp_path, drive_tbw=600.0)
    config = make_config(train=TRAIN, parallel={"data": 2}, offload=keys)
    root = tmp_path / "run"
    plain = msgspec.to_builtins(config)
    cluster.run("support.runs.small_runs:train_in", 2, config=plain, root=str(root))
    for line in metrics_of(root):
        said = line["offload"]
        assert 0 < said["sent_bytes"] <= said["eligible_bytes"]
        assert said["drive_years"] > 0
    assert events_of(root, "offload_failed") == []


def fail_to_read(rank: int, world_size: int, store: Store, *, config: dict, root: str) -> None:
    """Train with a drive of which nothing can be read from the second step on."""
    from holdfast.trainer.step.training import Training

    compute = Training.compute

    def compute_and_fail(self: Training, step: int, *at: Any) -> Any:
        if step == 1:
            assert self.offloader is not None
            assert self.offloader._room.file is not None
            self.offloader._room.file.engine.inject("read", 0, errno.EIO, 1 << 30)
        return compute(self, step, *at)

    Training.compute = compute_and_fail  # type: ignore[method-assign]
    try:
        train_in(rank, world_size, store, config=config, root=root)
    finally:
        Training.compute = compute  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def three_losses(cluster: Cluster) -> list[str]:
    """The losses of three steps of one process that keeps all in memory."""
    return run_training(cluster, make_config(train=TRAIN | {"steps": 3}))["losses"]


@pytest.mark.parametrize("shard", ["optimizer", "gradients"])
def test_a_drive_that_cannot_be_read_changes_no_bit(
    cluster: Cluster, tmp_path: Path, three_losses: list[str], shard: str
) -> None:
    """The step is computed again with all in memory; the run goes on so, and says it."""
    train, layout = TRAIN | {"steps": 3}, {"data": 2, "shard": shard}
    config = make_config(train=train, parallel=layout, offload=offload(tmp_path))
    root = tmp_path / "run"
    plain, job = msgspec.to_builtins(config), "test_offload_training:fail_to_read"
    cluster.run(job, 2, config=plain, root=str(root))
    assert [line["loss_hex"] for line in metrics_of(root)] == three_losses
    failed = events_of(root, "offload_failed")
    assert sorted(event["rank"] for event in failed) == [0, 1]
    assert all("cannot be read back" in event["reason"] for event in failed)


def plan_of_large(drive_bytes_per_s: float = 0.0) -> dict[str, Any]:
    config = make_config(
        model={"layers": 24, "hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 16},
        train={"seq_len": 1024, "global_batch": 8, "micro_batch": 2},
        parallel={"pipeline": 2},
        optimizer={"block_elements": 1 << 20},
        offload={"activations": "ssd", "drive_tbw": 600.0},
    )
    report = plan_report(
        config, flops_per_s=1e13, link_bytes_per_s=1e10, drive_bytes_per_s=drive_bytes_per_s
    )
    found = report.as_dict()
    assert [stage["stage"] for stage in found["offload"]["stages"]] == [0, 1]
    stage = found["offload"]["stages"][0]
    kept = found["memory_by_stage"][0]["activations"]
    assert stage["activations"] + stage["saved"] == kept
    return stage | {"before": kept}


def test_the_plan_says_what_is_saved_and_whether_the_drive_will_do() -> None:
    unknown, fast = plan_of_large(), plan_of_large(1e12)
    slow = plan_of_large(unknown["needed_bytes_per_s"] / 2)
    assert fast["saved"] > 0.7 * fast["before"]
    assert fast["share"] == unknown["share"] == 1.0
    assert (fast["fast_enough"], slow["fast_enough"], unknown["fast_enough"]) == (True, False, None)
    assert 0 < slow["saved"] < fast["saved"]
    # What the drive is asked for is what it takes to write all within nine tenths of the forward
    # passes.
    assert slow["share"] == pytest.approx(0.5)
    assert slow["drive_years"] > fast["drive_years"] > 0


def test_killed_ranks_change_no_bit(tmp_path: Path, cluster: Cluster) -> None:
    """A step that is given up frees what it had sent out, and is computed again."""
    train = {"steps": 9, "global_batch": 4}
    expected = bits_of(run_training(cluster, make_config(train=train)))
    starter = Starter(tmp_path)
    faults = [fault("kill", 3, 2, "backward"), fault("kill", 0, 7, "vote")]
    try:
        run = starter(
            train=train,
            parallel={"data": 2, "pipeline": 2},
            # With a heap of its own each process would import all anew.
            offload=offload(tmp_path, compact_heap=False),
            elastic=pace({"chaos": faults}, 0.1),
        )
        assert run.finish() == 0, run.output()
        assert run.bits() == expected
        assert run.events("recovered")
    finally:
        starter.close()


@pytest.mark.parametrize(
    ("overrides", "compact"),
    [
        (["offload.activations=ssd"], True),
        (["offload.activations=ssd", "offload.compact_heap=false"], False),
        (["offload.activations=ssd", "train.device=cuda"], False),
        ([], False),
    ],
)
def test_a_command_starts_again_with_a_compact_heap(
    tmp_path: Path, overrides: list[str], compact: bool
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\nfamily = "llama"\nlayers = 1\nhidden = 32\nheads = 4\nkv_heads = 2\n')
    program = (
        "import os, sys; from pathlib import Path\n"
        "from holdfast.trainer.run import load_run_config\n"
        "print('begun', flush=True); load_run_config(Path(sys.argv[1]), sys.argv[2:])\n"
        "print('tcache_count=0' in os.environ.get('GLIBC_TUNABLES', ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), *overrides],
        env={n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["begun"] * (2 if compact else 1) + [str(compact)]


def test_a_node_that_joins_has_a_compact_heap_too(tmp_path: Path) -> None:
    """It starts again before it takes part: here in a run that has ended meanwhile."""
    run, site = tmp_path / "run", tmp_path / "site"
    run.mkdir()
    site.mkdir()
    (run / "config.toml").write_text(dump_toml(make_config(offload={"activations": "ssd"})))
    (site / "sitecustomize.py").write_text(
        "import os\nprint('tcache_count=0' in os.environ.get('GLIBC_TUNABLES', ''), flush=True)\n"
    )
    environment = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [*HOLDFAST, "join", str(run)],
        env={**environment, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["False", "True"]
    assert "is not an elastic run that is under way" in done.stderr
