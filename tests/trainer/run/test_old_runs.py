"""A run that version 0.1 stopped half-way goes on as it would have there, in its own layout and
in others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from holdfast.trainer.config.loading import load_config
from support.processes.cluster import Cluster
from support.runs.commands import holdfast
from support.runs.golden_runs import (
    GoldenRun,
    assert_near,
    read_records,
    runs_of_kind,
    this_kind,
)
from support.runs.old_runs import OLD, STOPPED, copy_of, do_damage
from support.runs.small_runs import events_of, metrics_of, run_in

pytestmark = [pytest.mark.mp]
ONE_PROCESS = (
    "parallel.data=1",
    "parallel.pipeline=1",
    "parallel.virtual=1",
    "parallel.schedule=1f1b",
    "parallel.blocks_per_chunk=[]",
)


def _run_of(root: Path) -> GoldenRun:
    lines = metrics_of(root)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    [finished] = events_of(root, "run_finished")
    return GoldenRun(
        losses=[line["loss_hex"] for line in lines],
        norms=[line["grad_norm_hex"] for line in lines],
        digest=finished["parameter_digest"],
    )


def _check(root: Path, name: str, *, resumed_at: int = STOPPED) -> None:
    """A run that went on has its old lines as they were, and then the recorded ones."""
    run = _run_of(root)
    precision = load_config(OLD / name / "config.toml").train.precision
    records = read_records(OLD / "continued.json")
    for record in records:
        assert_near(run, record.runs[name], precision)
    recorded = runs_of_kind(records, this_kind())
    if recorded is not None:
        assert run == recorded[name]
    old, new = (place.joinpath("metrics.jsonl").read_text() for place in (OLD / name, root))
    assert new.splitlines()[:resumed_at] == old.splitlines()[:resumed_at]
    [resumed] = events_of(root, "resumed")
    assert resumed["step"] == resumed_at


def _go_on(root: Path, *overrides: str) -> None:
    """Let the command go on with a run, called in the folder that holds the run's and its data."""
    for path in (root / "text.txt", root / "tokenizer.json"):
        if path.exists():
            path.rename(root.parent / path.name)
    sets = [part for key in ("train.stop_after=0", *overrides) for part in ("--set", key)]
    done = holdfast(root.parent, "resume", root.name, *sets, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("fp32", {"data": 2, "pipeline": 2, "schedule": "zb-h1"}),
    ("bf16", {}),
    ("bf16", {"data": 2, "pipeline": 1}),
    ("tied", {}),
    ("tied", {"data": 1, "pipeline": 2}),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_an_old_run_goes_on_with_the_recorded_bits(
    cluster: Cluster, tmp_path: Path, name: str, layout: Mapping[str, Any]
) -> None:
    root = copy_of(name, tmp_path)
    sets = ["train.stop_after=0", "elastic.enabled=false"]
    sets += [f"parallel.{key}={value}" for key, value in layout.items()]
    config = load_config(root / "config.toml", sets)
    run_in(cluster, config, root)
    _check(root, name)


def test_the_command_goes_on_with_an_old_run_on_text(tmp_path: Path) -> None:
    """Interleaved, over two replicas, with a tokenizer file, and with evaluations."""
    root = copy_of("half-way", tmp_path)
    _go_on(root)
    _check(root, "half-way")
    assert [event["step"] for event in events_of(root, "evaluated")] == [2, 4, 6, 8]


def test_the_command_goes_on_with_an_old_run_in_another_layout(tmp_path: Path) -> None:
    root = copy_of("half-way", tmp_path)
    _go_on(root, *ONE_PROCESS)
    _check(root, "half-way")


def test_an_old_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    root = copy_of("half-way", tmp_path)
    damage = {"file": "optimizer-00002-of-00004.safetensors", "xor": 1, "at": 15000}
    do_damage(root / "checkpoints" / f"step-{STOPPED:08d}", damage)
    _go_on(root, *ONE_PROCESS)
    _check(root, "half-way", resumed_at=2)


@pytest.mark.slow
def test_the_command_goes_on_with_an_old_elastic_run(tmp_path: Path) -> None:
    """With agents, shadows and two nodes, as it was started."""
    root = copy_of("tied", tmp_path)
    _go_on(root)
    _check(root, "tied")
    assert events_of(root, "generation")[-1]["from_checkpoint"] == STOPPED
