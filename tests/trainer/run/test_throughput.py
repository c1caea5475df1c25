"""Rates that a plan is chosen from: measured once, equal on every rank, kept for the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.offload import compact_heap_environment
from holdfast.parallel.plan.cost import peak_activation_bytes
from holdfast.trainer.config import RunConfig, dump_toml, load_config
from holdfast.trainer.plan_report.report import plan_report
from holdfast.trainer.run.throughput import (
    Throughput,
    assumed,
    described,
    needs_throughput,
    recorded_throughput,
    resolve_throughput,
    with_throughput,
)
from holdfast.trainer.step.planning import plan_of
from support.processes.cluster import Cluster
from support.runs.commands import holdfast
from support.runs.small_runs import events_of, make_config, metrics_of, run_training

TRAIN = {"steps": 4, "global_batch": 8}


def automatic(folder: Path, train: dict[str, Any] | None = None, **offload: Any) -> RunConfig:
    layout = {"pipeline": 2}
    kept = peak_activation_bytes(plan_of(make_config(train=TRAIN, parallel=layout)), 0)
    keys = TRAIN | {"recompute": "auto", "activation_gib": 0.6 * kept / 2**30} | (train or {})
    sent = {"activations": "ssd", "path": str(folder), "smallest_kib": 1} | offload
    return make_config(train=keys, parallel=layout, offload=sent)


def test_only_what_is_left_open_is_filled_in(tmp_path: Path) -> None:
    config = automatic(tmp_path, drive_gbytes=3.0)
    assert needs_throughput(config)
    filled = with_throughput(config, Throughput(2.0, 1.0))
    assert (filled.train.tflops, filled.offload.drive_gbytes) == (2.0, 3.0)
    assert not needs_throughput(filled)
    assert not needs_throughput(make_config(train={"recompute": "full"}))
    instead = with_throughput(filled, Throughput(0.0, 1.0), instead=True)
    assert (instead.train.tflops, instead.offload.drive_gbytes) == (2.0, 1.0)


def test_recorded_rates_are_taken_before_measuring_again(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text('{"tflops": 7.0, "drive_gbytes": 5.0}\n')
    config = automatic(tmp_path)
    said: list[str] = []
    resolved = resolve_throughput(config, tmp_path, ranks_here=2, fresh=False, say=said.append)
    assert (resolved.train.tflops, resolved.offload.drive_gbytes) == (7.0, 5.0)
    assert resolved == recorded_throughput(config, tmp_path)
    assert said == []


def test_a_machine_that_does_not_find_the_rates_plans_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rates.json.*that all machines share"):
        recorded_throughput(automatic(tmp_path), tmp_path)


@pytest.mark.mp
def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    config = automatic(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"cannot be offloaded to .*missing.*; set train.tflops"):
        resolve_throughput(config, tmp_path, ranks_here=1, fresh=False, say=print)
    assert not (tmp_path / "rates.json").exists()


def test_a_plan_says_which_rates_it_was_chosen_for(tmp_path: Path) -> None:
    config = automatic(tmp_path)
    assert "not known" in plan_report(config).as_dict()["recompute_for"]
    slow = plan_report(config, flops_per_s=1e15, drive_bytes_per_s=1e3)
    assert "1e+03 TFLOP/s" in assumed(slow.config)
    assert {layer.recompute for layer in slow.plan.layers} != {"none"}


@pytest.mark.mp
def test_a_run_measures_and_keeps_what_every_rank_plans_with(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in compact_heap_environment(os.environ).items():
        monkeypatch.setenv(name, value)  # so that the command does not start itself again

    expected = run_training(cluster, make_config(train=TRAIN))
    config = automatic(tmp_path)
    path, root = tmp_path / "run.toml", tmp_path / "run"
    path.write_text(dump_toml(config))
    done = holdfast(tmp_path, "train", str(path), "--out", str(root), timeout_s=240)
    assert done.returncode == 0, done.stderr
    rates = msgspec.json.decode((root / "rates.json").read_bytes(), type=Throughput)
    assert rates.tflops > 0
    assert rates.drive_gbytes > 0
    assert f"measured {described(rates)}" in done.stdout
    assert load_config(root / "config.toml") == with_throughput(config, rates)
    assert [line["loss_hex"] for line in metrics_of(root)] == expected["losses"]
    (end,) = events_of(root, "run_finished")
    assert end["parameter_digest"] == expected["digest"]


def test_each_rank_is_measured_by_its_own_part_of_a_block(tmp_path: Path) -> None:
    """A part's operations over its rate are its time, whatever the tensor degree."""
    from holdfast.trainer.run.throughput_probe import measure

    config = make_config(
        model={"hidden": 64, "heads": 8, "kv_heads": 4, "intermediate": 128},
        parallel={"tensor": 4},
        offload={"activations": "ssd", "path": str(tmp_path), "limit_mib_per_s": 1.0},
    )
    rates = measure(config, torch.device("cpu"))
    assert rates.tflops > 0
    assert rates.drive_gbytes == pytest.approx(2**20 / 1e9, rel=0.01)
